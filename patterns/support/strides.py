"""What is left to do below a node whose strides have changed: fake values of views, and copies that copy nothing any more."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from inductor_ext import memory
from inductor_ext.calls import aten, is_call
from inductor_ext.graph import erase_dead, same_sizes, value_of
from inductor_ext.memory import is_view


def refresh(node: Node, fake_mode: Any = None) -> None:
    """Fake values of the views below ``node``, whose strides have changed: later rules read them."""
    fake_mode = fake_mode or value_of(node).fake_mode
    for user in list(node.users):
        if not is_view(user):
            continue
        if is_call(user, aten.view.default):
            user.target = aten.reshape.default  # Inductor makes this change too, but before our pass
        arguments, keywords = torch.fx.map_arg((user.args, user.kwargs), value_of)
        with fake_mode:
            user.meta["val"] = user.target(*arguments, **keywords)
        refresh(user, fake_mode)


def drop_idle_copies(node: Node) -> None:
    """Let readers of a copy of ``node``, or of a view of it, that lies as what it copies read that."""
    for value, user in list(memory.readers(node)):
        alike = is_call(user, aten.clone.default) and same_sizes(value_of(user).stride(), value_of(value).stride())
        if alike and memory.may_be_one(user, value):
            user.replace_all_uses_with(value)
            refresh(value)
            erase_dead(user)
