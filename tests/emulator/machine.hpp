// A CUDA machine on a CPU, as kernels see it: the words of CUDA C++ that they use, in terms of machine.cpp.
//
// A block is an operating system's thread; its CUDA threads ("lanes" below, of a warp) are fibers that run one at a
// time, each until it waits for others. So `__shared__` variables are the block's `thread_local` ones.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __device__
#define __global__
#define __restrict__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)

// What is no kernel's own: its accesses are not looked at.
#define UNSEEN __attribute__((no_sanitize("thread")))

// ---- vector types: aligned as CUDA's are

struct uint3 {
  unsigned x, y, z;
};
#define VECTOR(type, base, size)                                   \
  struct __align__(2 * size) type##2 { base x, y; };               \
  struct __align__(4 * size) type##4 { base x, y, z, w; };         \
  inline type##2 make_##type##2(base x, base y) { return {x, y}; } \
  inline type##4 make_##type##4(base x, base y, base z, base w) { return {x, y, z, w}; }
VECTOR(float, float, 4)
VECTOR(int, int, 4)
VECTOR(uint, unsigned, 4)
#undef VECTOR

namespace machine {

using u32 = std::uint32_t;
using u64 = unsigned long long;
using u16 = std::uint16_t;
using u8 = std::uint8_t;

struct Block;
struct Warp;

// What every lane of a collective brings, and what it takes away.
struct Exchange {
  unsigned char in[64], out[32];
};

// Done once by the last lane of `mask` to come, for all of them.
using Collective = void (*)(Exchange* lanes, u32 mask);

extern "C" {
// Of the calling lane; `const`, because it is the same one before and after it waits.
u32 machine_thread() __attribute__((const));
uint3 machine_block() __attribute__((const));
uint3 machine_grid() __attribute__((const));
u32 machine_threads() __attribute__((const));

// Waits for the lanes of `mask`, all of which must call the same `what`. Gives the lane's exchange, to read `out`.
Exchange* machine_meet(u32 mask, const char* what, Collective work);
Exchange* machine_exchange();

void machine_barrier(int name, int threads);  // 0: of all the block's threads
void machine_cluster_arrive(bool with_memory);
void machine_cluster_wait();
u32 machine_cluster_address(u32 here, u32 rank);
void machine_load_cluster(void* to, u32 there, int size);
void machine_store_cluster(u32 there, const void* from, int size);
void machine_waited();
void machine_dependents();

u8* machine_dynamic_shared() __attribute__((const));
u32 machine_shared_address(const void* p);
void machine_copy_async(u32 shared, const void* global, bool wanted);
void machine_copy_commit();
void machine_copy_wait(int groups);
// Ends the launch with an error unless `size` bytes of one allocation lie at p, which is a multiple of `alignment`.
void machine_check_global(const void* p, std::size_t size, std::size_t alignment);
void machine_atomic(void* p, std::size_t size);
void machine_fence();
const void* machine_check_shared(const void* p, std::size_t size, std::size_t alignment, const char* what);
void machine_mma(Exchange* lanes, u32 mask);
}

// ---- an entry of a compiled module

struct Entry {
  const char* name;
  const char* kinds;  // of parameters: p, a pointer; i, an int; f, a float
  void (*invoke)(void* const* arguments);
  int most_threads;
  int cluster[3];
};

template <class T> constexpr char kind_of() {
  if constexpr (std::is_pointer_v<T>) return 'p';
  if constexpr (std::is_same_v<T, int> || std::is_same_v<T, unsigned>) return 'i';
  if constexpr (std::is_same_v<T, float>) return 'f';
  return '?';
}

template <auto kernel> struct Kernel;
template <class... P, void (*kernel)(P...)> struct Kernel<kernel> {
  static constexpr char kinds[] = {kind_of<P>()..., 0};
  template <std::size_t... I> UNSEEN static void call(void* const* a, std::index_sequence<I...>) {
    kernel(*(P*)a[I]...);
  }
  UNSEEN static void invoke(void* const* a) { call(a, std::index_sequence_for<P...>{}); }
};

}  // namespace machine

#define threadIdx (uint3{machine::machine_thread(), 0, 0})
#define blockIdx (machine::machine_block())
#define gridDim (machine::machine_grid())
#define blockDim (uint3{machine::machine_threads(), 1, 1})

// ---- arithmetic

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline unsigned long long __float2ull_rn(float x) { return x > 0 ? (unsigned long long)std::nearbyint(x) : 0; }
inline unsigned __float_as_uint(float f) {
  unsigned u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    const unsigned s = selector >> 4 * i & 15, byte = unsigned(both >> 8 * (s & 7)) & 255;
    r |= (s & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return r;
}

#define BOTH(name, type, sign) \
  inline type name(type a, type b) { return a sign b ? a : b; }
#define SMALLER_AND_LARGER(type) BOTH(min, type, <) BOTH(max, type, >)
SMALLER_AND_LARGER(int)
SMALLER_AND_LARGER(unsigned)
SMALLER_AND_LARGER(long)
SMALLER_AND_LARGER(unsigned long)
SMALLER_AND_LARGER(long long)
SMALLER_AND_LARGER(unsigned long long)
#undef SMALLER_AND_LARGER
#undef BOTH
inline unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
inline unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
inline unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
inline unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }

// ---- memory

template <class T> inline T __ldcg(const T* p) {
  machine::machine_check_global(p, sizeof(T), alignof(T));
  return *p;
}
template <class T> inline T __ldg(const T* p) { return __ldcg(p); }
inline void __threadfence() { machine::machine_fence(); }
inline void __threadfence_block() {}

namespace machine {

// *p = function(*p), in one; gives what it was.
template <class T, class Function> UNSEEN T change(T* p, Function function) {
  machine_atomic(p, sizeof(T));
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, function(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

}  // namespace machine

#define ATOMIC(type)                                                                \
  inline type atomicAdd(type* p, type v) {                                          \
    return machine::change(p, [v](type old) { return old + v; });                   \
  }                                                                                 \
  inline type atomicExch(type* p, type v) {                                         \
    return machine::change(p, [v](auto) { return v; });                             \
  }                                                                                 \
  inline type atomicMin(type* p, type v) {                                          \
    return machine::change(p, [v](type old) { return old < v ? old : v; });         \
  }                                                                                 \
  inline type atomicMax(type* p, type v) {                                          \
    return machine::change(p, [v](type old) { return old > v ? old : v; });         \
  }                                                                                 \
  inline type atomicCAS(type* p, type was, type v) {                                \
    return machine::change(p, [was, v](type old) { return old == was ? v : old; }); \
  }
ATOMIC(int)
ATOMIC(unsigned)
ATOMIC(unsigned long long)
#undef ATOMIC
inline unsigned atomicInc(unsigned* p, unsigned most) {
  return machine::change(p, [most](unsigned old) { return old >= most ? 0u : old + 1; });
}

// ---- barriers and what a warp does together

inline void __syncthreads() { machine::machine_barrier(0, 0); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { machine::machine_meet(mask, "__syncwarp", nullptr); }

namespace machine {

template <class T> struct Shuffled {
  T value;
  int from;  // lane
};

template <class T> UNSEEN void shuffle_work(Exchange* lanes, u32 mask) {
  for (u32 left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    Shuffled<T> mine, theirs;
    std::memcpy(&mine, lanes[lane].in, sizeof mine);
    std::memcpy(&theirs, lanes[mine.from].in, sizeof theirs);
    // Of a lane that does not take part there is no value.
    if (!(mask >> mine.from & 1)) std::memset(&theirs.value, 0xff, sizeof theirs.value);
    std::memcpy(lanes[lane].out, &theirs.value, sizeof theirs.value);
  }
}

template <class T> inline T shuffle(u32 mask, T value, int from, const char* what) {
  static_assert(sizeof(Shuffled<T>) <= sizeof(Exchange::in));
  const Shuffled<T> mine{value, from};
  std::memcpy(machine_exchange()->in, &mine, sizeof mine);
  std::memcpy(&value, machine_meet(mask, what, shuffle_work<T>)->out, sizeof value);
  return value;
}

template <class Reduce> UNSEEN void reduce_work(Exchange* lanes, u32 mask) {
  u32 result = Reduce::start;
  for (u32 left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    u32 value;
    std::memcpy(&value, lanes[lane].in, 4);
    result = Reduce::join(result, value, lane);
  }
  for (u32 left = mask; left; left &= left - 1) std::memcpy(lanes[__builtin_ctz(left)].out, &result, 4);
}

struct Ballot {
  static constexpr u32 start = 0;
  static u32 join(u32 a, u32 b, int lane) { return a | (b ? 1u << lane : 0); }
};
struct All {
  static constexpr u32 start = 1;
  static u32 join(u32 a, u32 b, int) { return a & (b != 0); }
};
struct Any {
  static constexpr u32 start = 0;
  static u32 join(u32 a, u32 b, int) { return a | (b != 0); }
};
struct Most {
  static constexpr u32 start = 0;
  static u32 join(u32 a, u32 b, int) { return a > b ? a : b; }
};
struct Least {
  static constexpr u32 start = ~0u;
  static u32 join(u32 a, u32 b, int) { return a < b ? a : b; }
};
struct Sum {
  static constexpr u32 start = 0;
  static u32 join(u32 a, u32 b, int) { return a + b; }
};

template <class Reduce> inline u32 reduce(u32 mask, u32 value, const char* what) {
  std::memcpy(machine_exchange()->in, &value, 4);
  std::memcpy(&value, machine_meet(mask, what, reduce_work<Reduce>)->out, 4);
  return value;
}

UNSEEN inline void match_work(Exchange* lanes, u32 mask) {
  u32 values[32];
  for (u32 left = mask; left; left &= left - 1)
    std::memcpy(values + __builtin_ctz(left), lanes[__builtin_ctz(left)].in, 4);
  for (u32 left = mask; left; left &= left - 1) {
    const int lane = __builtin_ctz(left);
    u32 same = 0;
    for (u32 others = mask; others; others &= others - 1)
      if (values[__builtin_ctz(others)] == values[lane]) same |= others & -others;
    std::memcpy(lanes[lane].out, &same, 4);
  }
}

}  // namespace machine

template <class T> inline T __shfl_sync(unsigned mask, T v, int from) {
  return machine::shuffle(mask, v, from & 31, "__shfl_sync");
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int other) {
  return machine::shuffle(mask, v, ((machine::machine_thread() & 31) ^ other) & 31, "__shfl_xor_sync");
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned by) {
  const unsigned lane = (machine::machine_thread() & 31);
  return machine::shuffle(mask, v, lane < by ? lane : lane - by, "__shfl_up_sync");
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned by) {
  const unsigned lane = (machine::machine_thread() & 31);
  return machine::shuffle(mask, v, lane + by > 31 ? lane : lane + by, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int v) {
  return machine::reduce<machine::Ballot>(mask, v != 0, "__ballot_sync");
}
inline int __all_sync(unsigned mask, int v) { return machine::reduce<machine::All>(mask, v != 0, "__all_sync"); }
inline int __any_sync(unsigned mask, int v) { return machine::reduce<machine::Any>(mask, v != 0, "__any_sync"); }
inline unsigned __reduce_max_sync(unsigned mask, unsigned v) {
  return machine::reduce<machine::Most>(mask, v, "__reduce_max_sync");
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned v) {
  return machine::reduce<machine::Least>(mask, v, "__reduce_min_sync");
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v) {
  return machine::reduce<machine::Sum>(mask, v, "__reduce_add_sync");
}
inline unsigned __match_any_sync(unsigned mask, unsigned v) {
  std::memcpy(machine::machine_exchange()->in, &v, 4);
  std::memcpy(&v, machine::machine_meet(mask, "__match_any_sync", machine::match_work)->out, 4);
  return v;
}
