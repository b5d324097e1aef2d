// Threads of a block as fibres. swapcontext asks the kernel for the signal mask at each switch; _setjmp and _longjmp do not, and
// switching is most of what these threads do. The process that compiles this must not define _FORTIFY_SOURCE: a checked longjmp
// takes another stack for a mistake.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <memory>

struct Fibre {
  ucontext_t first;  // where it begins
  jmp_buf at;        // where it goes on
  bool begun = false;
};

inline void make_fibre(Fibre& fibre, char* stack, size_t bytes, void (*body)()) {
  getcontext(&fibre.first);
  fibre.first.uc_stack = {stack, 0, bytes};
  fibre.first.uc_link = nullptr;
  makecontext(&fibre.first, body, 0);
  fibre.begun = false;
}

// Lets a fibre go on until it leaves. Neither is inlined: the frame that called setjmp has to be there when it is come back to.
__attribute__((noinline)) inline void resume(Fibre& fibre, jmp_buf& back) {
  if (_setjmp(back)) return;
  if (fibre.begun) _longjmp(fibre.at, 1);
  fibre.begun = true;
  setcontext(&fibre.first);
}

__attribute__((noinline)) inline void leave(Fibre& fibre, jmp_buf& back) {
  if (!_setjmp(fibre.at)) _longjmp(back, 1);
}

// Room for the stacks of a block, kept for the next: clearing eight megabytes took longer than most blocks.
inline char* stacks_of(size_t bytes) {
  static thread_local std::unique_ptr<char[]> kept;
  static thread_local size_t size = 0;
  if (size < bytes) kept.reset(new char[bytes]), size = bytes;
  return kept.get();
}
