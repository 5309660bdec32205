// What every kernel needs of the machine, without CUDA's headers: NVRTC compiles these files as they are.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;  // also a float16's bits
using u32 = unsigned int;
using u64 = unsigned long long;

#define DEVICE __device__ __forceinline__

constexpr u32 FULL_WARP = 0xffffffffu;
constexpr float HALF_MAX = 65504.f;

// ---- float16

DEVICE float half_to_float(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

DEVICE float2 half2_to_float2(u32 h) {
  return make_float2(half_to_float(u16(h)), half_to_float(u16(h >> 16)));
}

DEVICE float saturate_half(float f) { return fminf(fmaxf(f, -HALF_MAX), HALF_MAX); }

// Values beyond float16's range become its largest, never infinite.
DEVICE u16 float_to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(saturate_half(f)));
  return h;
}

// For values known to be in range; `low` is the half at the lower address.
DEVICE u32 pack_half2(float low, float high) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

DEVICE u32 pack_half2_saturated(float low, float high) {
  return pack_half2(saturate_half(low), saturate_half(high));
}

DEVICE u32 half2_subtract(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// 2^x, with 0 for x far below; a few units in the last place.
DEVICE float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// ---- memory

// Past L1, whose lines are not kept in step with what other multiprocessors write.
template <class T> DEVICE T load_l2(const T* p) { return __ldcg(p); }

DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// 16 bytes to shared memory, past L1; zeros without touching `global` unless `wanted`.
DEVICE void copy_async(void* shared, const void* global, bool wanted = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(wanted ? 16 : 0)
               : "memory");
}

DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of the groups this thread has committed are still under way.
template <int N> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- tensor cores

// Four 8×8 matrices of 16-bit elements; lane i's `row` is row i % 8 of matrix i / 8.
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// An 8×8 matrix of 16-bit elements across the warp, transposed in registers.
DEVICE u32 transpose_matrix(u32 a) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// c[16×8] += a[16×16] · b[16×8]. Lane 4g + t holds, with rows g and g + 8 and columns 2t and 2t + 1:
//   a0 (g, 2t…) · a1 (g + 8, 2t…) · a2 (g, 2t + 8…) · a3 (g + 8, 2t + 8…)
//   b0 (2t…, g) · b1 (2t + 8…, g) · c0, c1 (g, 2t…) · c2, c3 (g + 8, 2t…)
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// d = a · b + c.
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// ---- programmatic dependent launch (compute capability 9): without it a kernel starts when all is done

// The next kernel may start, and run up to its own wait.
DEVICE void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until all kernels before this one have ended and their writes can be seen. Every block calls it, one with nothing
// to do as well: a kernel of which no block has waited can end before the one in front of it, and the one after it
// would then wait for too little.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- warps

DEVICE float warp_sum(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(FULL_WARP, v, o);
  return v;
}

DEVICE float warp_max(float v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, o));
  return v;
}
