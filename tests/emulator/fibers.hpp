// Switching between fibers of one thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace machine {

// Saves what a call must keep on the stack, whose address goes to *save, and goes on where `to` was saved.
extern "C" void machine_switch(void** save, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.type machine_switch, @function
machine_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size machine_switch, .-machine_switch
)");
// What machine_switch goes to: `entry`, which must not return, on a stack that ends at `top`.
inline void* new_stack(unsigned char* top, void (*entry)()) {
  void** at = (void**)(std::uintptr_t(top) & ~std::uintptr_t(15));
  *--at = nullptr;  // where `entry` would return to
  *--at = (void*)entry;
  for (int i = 0; i < 6; i++) *--at = nullptr;
  return at;
}
#elif defined(__aarch64__)
asm(R"(
.text
.type machine_switch, %function
machine_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size machine_switch, .-machine_switch
)");
inline void* new_stack(unsigned char* top, void (*entry)()) {
  void** at = (void**)(std::uintptr_t(top) & ~std::uintptr_t(15)) - 20;
  std::fill(at, at + 20, nullptr);
  at[11] = (void*)entry;  // x30
  return at;
}
#else
#error "fibers are written for x86-64 and aarch64"
#endif

}  // namespace machine
