// A fiber: a function with a stack of its own that suspends and resumes. Hand-written switch on x86-64, ucontext elsewhere.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

#if defined(__x86_64__)
using Context = void*;  // the stack pointer; all that must survive lies on the stack

__attribute__((naked, noinline)) inline void switch_context(Context*, Context) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
#endif

class Fiber {
 public:
  using Entry = void (*)(void*);

  // Makes the fiber begin entry(argument) at its next resume; what ran in it before is forgotten.
  void start(Entry entry, void* argument) {
    entry_ = entry, argument_ = argument;
    if (!stack_) stack_.reset(new char[kStack]);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_.get(), kStack);  // the frames of the last run ended without returning
#endif
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(stack_.get() + kStack) & ~uintptr_t{15};
    auto* frame = reinterpret_cast<uintptr_t*>(top) - 8;
    for (int i = 0; i < 6; ++i) frame[i] = 0;  // the registers that the switch restores
    frame[6] = reinterpret_cast<uintptr_t>(&Fiber::trampoline);
    frame[7] = 0;  // trampoline returns nowhere; also the alignment that a call leaves
    inside_ = frame;
#else
    getcontext(&inside_);
    inside_.uc_stack.ss_sp = stack_.get(), inside_.uc_stack.ss_size = kStack, inside_.uc_link = nullptr;
    makecontext(&inside_, &Fiber::trampoline, 0);
#endif
  }

  // Runs the fiber until it suspends or ends.
  void resume() {
    starting_ = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStack);
#endif
    swap(outside_, inside_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  void suspend() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, outside_stack_, outside_bytes_);
#endif
    swap(inside_, outside_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &outside_stack_, &outside_bytes_);
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kStack = 512 << 10;  // redzones make frames large
#else
  static constexpr size_t kStack = 128 << 10;
#endif

  static void trampoline() {
    Fiber& fiber = *starting_;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &fiber.outside_stack_, &fiber.outside_bytes_);
#endif
    fiber.entry_(fiber.argument_);
    fiber.suspend();
    __builtin_unreachable();  // an ended fiber is never resumed
  }

#if defined(__x86_64__)
  static void swap(Context& save, Context& load) { switch_context(&save, load); }
  Context inside_ = nullptr, outside_ = nullptr;
#else
  static void swap(ucontext_t& save, ucontext_t& load) { swapcontext(&save, &load); }
  ucontext_t inside_, outside_;
#endif
  static inline Fiber* starting_ = nullptr;
  std::unique_ptr<char[]> stack_;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const void* outside_stack_ = nullptr;
  size_t outside_bytes_ = 0;
#endif
};

}  // namespace simt
