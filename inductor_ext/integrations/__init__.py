"""Ties to other libraries; none is imported unless it is asked for."""
