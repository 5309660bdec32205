// In the place of edgellm/kernels/ptx.cuh: what its functions do, on a CPU.
#pragma once

#include "machine.hpp"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#define DEVICE inline
#define DYNAMIC_SHARED(name) u8* const name = machine::machine_dynamic_shared()

DEVICE void kept(u32&) {}

DEVICE u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }

// ---- float16

DEVICE float half_to_float(u16 h) {
  const u32 sign = u32(h & 0x8000) << 16, rest = u32(h & 0x7fff) << 13;
  // The exponent's bias is 127 instead of 15; subnormals become normal by the way.
  const u32 bits = __float_as_uint(__uint_as_float(rest) * 0x1p112f);
  return __uint_as_float(sign | (rest >= 0x7c00u << 13 ? rest | 0x7f800000u : bits));
}

DEVICE u16 round_to_half(float f) {
  const u32 bits = __float_as_uint(f), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000) return 0x7fff;
  if (rest >= 0x477ff000) return u16(sign | 0x7c00);  // 65520 and more
  if (rest < 0x38800000)                              // subnormal: adding 0.5 leaves its bits, rounded, at the end
    return u16(sign | (__float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000));
  return u16(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
}

// What is rounded twice must be rounded to odd first.
DEVICE u16 round_to_half(double d) {
  float f = float(d);
  if (double(f) != d && std::isfinite(f)) {
    u32 bits = __float_as_uint(f);
    if (std::fabs(double(f)) > std::fabs(d)) bits--;
    f = __uint_as_float(bits | 1);
  }
  return round_to_half(f);
}

DEVICE u32 pack_half2(float low, float high) { return round_to_half(low) | u32(round_to_half(high)) << 16; }

template <class Function> DEVICE u32 each_half(u32 a, u32 b, u32 c, Function function) {
  const auto one = [&](int shift) {
    return u32(round_to_half(function(double(half_to_float(u16(a >> shift))), double(half_to_float(u16(b >> shift))),
                                      double(half_to_float(u16(c >> shift))))))
           << shift;
  };
  return one(0) | one(16);
}

DEVICE u32 half2_add(u32 a, u32 b) {
  return each_half(a, b, 0, [](double x, double y, double) { return x + y; });
}
DEVICE u32 half2_subtract(u32 a, u32 b) {
  return each_half(a, b, 0, [](double x, double y, double) { return x - y; });
}
DEVICE u32 half2_multiply(u32 a, u32 b) {
  return each_half(a, b, 0, [](double x, double y, double) { return x * y; });
}
DEVICE u32 half2_multiply_add(u32 a, u32 b, u32 c) {
  return each_half(a, b, c, [](double x, double y, double z) { return x * y + z; });
}

DEVICE float exp2_fast(float x) { return x < -126.f ? 0.f : exp2f(x); }

DEVICE float log2_fast(float x) { return log2f(x); }

// ---- memory

template <class T> DEVICE T load_l2(const T* p) { return __ldcg(p); }

DEVICE u32 count_arrival(u32* counter, u32 last) {
  __threadfence();
  const u32 before = atomicInc(counter, last);
  __threadfence();
  return before;
}

DEVICE u32 shared_address(const void* p) { return machine::machine_shared_address(p); }

DEVICE void copy_async(void* shared, const void* global, bool wanted = true) {
  machine::machine_copy_async(shared_address(shared), global, wanted);
}
DEVICE void copy_async(u32 shared, const void* global) { machine::machine_copy_async(shared, global, true); }
DEVICE void stream_async(u32 shared, const void* global) { machine::machine_copy_async(shared, global, true); }
DEVICE void copy_async_commit() { machine::machine_copy_commit(); }
template <int N> DEVICE void copy_async_wait() { machine::machine_copy_wait(N); }

// ---- tensor cores

namespace machine {

inline const u8* row_of(const Exchange& lane) {
  const u8* row;
  std::memcpy(&row, lane.in, sizeof row);
  return row;
}

UNSEEN inline void load_matrices_work(Exchange* lanes, u32) {
  for (int lane = 0; lane < 32; lane++)
    for (int matrix = 0; matrix < 4; matrix++)
      std::memcpy(lanes[lane].out + matrix * 4, row_of(lanes[matrix * 8 + lane / 4]) + lane % 4 * 4, 4);
}

UNSEEN inline void load_matrices_transposed_work(Exchange* lanes, u32) {
  for (int lane = 0; lane < 32; lane++)
    for (int matrix = 0; matrix < 4; matrix++)
      for (int i = 0; i < 2; i++)
        std::memcpy(lanes[lane].out + matrix * 4 + i * 2, row_of(lanes[matrix * 8 + lane % 4 * 2 + i]) + lane / 4 * 2,
                    2);
}

UNSEEN inline void transpose_matrix_work(Exchange* lanes, u32) {
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 2; i++) {
      // Element (lane / 4, lane % 4 * 2 + i) of the result is the one of the operand with both exchanged.
      const int row = lane % 4 * 2 + i, column = lane / 4;
      std::memcpy(lanes[lane].out + i * 2, lanes[row * 4 + column / 2].in + column % 2 * 2, 2);
    }
}

inline void load_matrices(::u32 (&r)[4], const void* row, const char* what, Collective work) {
  row = machine_check_shared(row, 16, 16, what);
  std::memcpy(machine_exchange()->in, &row, sizeof row);
  std::memcpy(r, machine_meet(~0u, what, work)->out, 16);
}

}  // namespace machine

DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  machine::load_matrices(r, row, "load_matrices", machine::load_matrices_work);
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
  machine::load_matrices(r, row, "load_matrices_transposed", machine::load_matrices_transposed_work);
}
DEVICE u32 transpose_matrix(u32 a) {
  std::memcpy(machine::machine_exchange()->in, &a, 4);
  std::memcpy(&a, machine::machine_meet(~0u, "transpose_matrix", machine::transpose_matrix_work)->out, 4);
  return a;
}

DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float (&c)[4]) {
  const u32 operands[6] = {a0, a1, a2, a3, b0, b1};
  unsigned char* const in = machine::machine_exchange()->in;
  std::memcpy(in, operands, 24);
  std::memcpy(in + 24, c, 16);
  std::memcpy(d, machine::machine_meet(~0u, "mma", machine::machine_mma)->out, 16);
}
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { mma(c, a0, a1, a2, a3, b0, b1, c); }

namespace machine {

template <class A, class B> UNSEEN void mma_bytes_work(Exchange* lanes, u32) {
  int a[16][32], b[32][8];
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    ::u32 w[6];
    std::memcpy(w, lanes[lane].in, 24);
    for (int i = 0; i < 4; i++) {
      const auto byte = [&](int word) { return u8(w[word] >> 8 * i); };
      a[g][4 * t + i] = A(byte(0)), a[g + 8][4 * t + i] = A(byte(1));
      a[g][16 + 4 * t + i] = A(byte(2)), a[g + 8][16 + 4 * t + i] = A(byte(3));
      b[4 * t + i][g] = B(byte(4)), b[16 + 4 * t + i][g] = B(byte(5));
    }
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      int c;
      std::memcpy(&c, lanes[lane].in + 24 + i * 4, 4);
      for (int k = 0; k < 32; k++) c += a[row][k] * b[k][column];
      std::memcpy(lanes[lane].out + i * 4, &c, 4);
    }
}

template <class A, class B>
inline void mma_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const char* what) {
  const ::u32 operands[6] = {a0, a1, a2, a3, b0, b1};
  unsigned char* const in = machine_exchange()->in;
  std::memcpy(in, operands, 24);
  std::memcpy(in + 24, c, 16);
  std::memcpy(c, machine_meet(~0u, what, mma_bytes_work<A, B>)->out, 16);
}

}  // namespace machine

DEVICE void mma_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  machine::mma_bytes<u8, signed char>(c, a0, a1, a2, a3, b0, b1, "mma_bytes");
}
DEVICE void mma_signed_bytes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  machine::mma_bytes<signed char, u8>(c, a0, a1, a2, a3, b0, b1, "mma_signed_bytes");
}

// ---- barriers

template <int THREADS> DEVICE void named_barrier(int name) { machine::machine_barrier(name, THREADS); }

// ---- programmatic dependent launch

DEVICE void launch_dependents() { machine::machine_dependents(); }
DEVICE void wait_for_previous() { machine::machine_waited(); }

// ---- clusters

#if __CUDA_ARCH__ >= 900
DEVICE void cluster_started() { machine::machine_cluster_arrive(false); }
DEVICE void cluster_arrive() { machine::machine_cluster_arrive(true); }
DEVICE void cluster_wait() { machine::machine_cluster_wait(); }
DEVICE u32 cluster_address(u32 here, u32 rank) { return machine::machine_cluster_address(here, rank); }
DEVICE float load_cluster(u32 there) {
  float v;
  machine::machine_load_cluster(&v, there, 4);
  return v;
}
DEVICE void store_cluster(u32 there, float v) { machine::machine_store_cluster(there, &v, 4); }
DEVICE void store_cluster(u32 there, uint4 v) { machine::machine_store_cluster(there, &v, 16); }
DEVICE void store_cluster(u32 there, float4 v) { machine::machine_store_cluster(there, &v, 16); }
#else
DEVICE void cluster_started() {}
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() {}
DEVICE u32 cluster_address(u32, u32) { return 0; }
DEVICE float load_cluster(u32) { return 0.f; }
DEVICE void store_cluster(u32, float) {}
DEVICE void store_cluster(u32, uint4) {}
DEVICE void store_cluster(u32, float4) {}
#endif
DEVICE void cluster_barrier() {
  cluster_arrive();
  cluster_wait();
}
