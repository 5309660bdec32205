// Tokens in the order of their likelihood, and one drawn from them: what a block does with a list that fits it.
//
// A kept set is a prefix of the tokens by likelihood, equal ones by id. It is written as the key of its last token
// (a key is 0 for the largest logit and grows as they fall) and that token's id.
#pragma once

#include "common.cuh"

constexpr int CHOOSERS = 512;  // threads of the block
constexpr int CHOOSER_WARPS = CHOOSERS / 32;
constexpr int LISTED = 2048;                   // tokens that can be sorted
constexpr int BINS = 1024;                     // of a histogram
constexpr float WEIGHT_ONE = 1099511627776.f;  // 2^40, a weight of 1 as an integer
constexpr u32 LAST_KEY = 0x7f7fffffu;          // of a logit that is far below, but not −inf
constexpr int ANY_ID = 0x7fffffff;

#define INFINITE __int_as_float(0x7f800000)

// ---- sums over the block

struct Scratch {
  u64 sums[CHOOSER_WARPS][4];
  double ends[CHOOSER_WARPS], before;
  int first, last, segment;
};

template <int N>
DEVICE void block_sums(u64 (&v)[N], Scratch& scratch) {
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
#pragma unroll
    for (int o = 16; o; o >>= 1) v[i] += __shfl_xor_sync(FULL_WARP, v[i], o);
    if ((threadIdx.x & 31) == 0) scratch.sums[threadIdx.x >> 5][i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) {
    v[i] = scratch.sums[threadIdx.x % CHOOSER_WARPS][i];
#pragma unroll
    for (int o = CHOOSER_WARPS / 2; o; o >>= 1) v[i] += __shfl_xor_sync(FULL_WARP, v[i], o);
  }
}

// The sum of `own` up to this thread, itself included; `total` is that of all.
DEVICE double block_scan(double own, double& total, Scratch& scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  double ends = own, before = 0.;
#pragma unroll
  for (int o = 1; o < 32; o <<= 1) {
    const double other = __shfl_up_sync(FULL_WARP, ends, o);
    if (lane >= o) ends += other;
  }
  __syncthreads();
  if (lane == 31) scratch.ends[warp] = ends;
  __syncthreads();
  total = 0.;
#pragma unroll
  for (int w = 0; w < CHOOSER_WARPS; w++) {
    if (w == warp) before = total;
    total += scratch.ends[w];
  }
  return before + ends;
}

// ---- tokens by likelihood

// How a logit becomes a key, with the host's two roundings, so that the same logits are equal here and there.
struct Scale {
  float peak, inverse_temperature;
  float bins;  // of a histogram, for each unit of a key

  DEVICE float scaled(float x) const { return __fmul_rn(__fsub_rn(x, peak), inverse_temperature); }
  DEVICE u32 key(float x) const { return __float_as_uint(scaled(x)) & 0x7fffffffu; }
  DEVICE static float weight(u32 key) { return expf(-__uint_as_float(key)); }
  DEVICE static u64 exact(float weight) { return __float2ull_rn(weight * WEIGHT_ONE); }
  DEVICE int bin(u32 key) const { return int(fminf(__uint_as_float(key) * bins, float(BINS - 1))); }
};

// What is kept of the tokens.
struct Kept {
  u32 key = LAST_KEY;
  int id = ANY_ID;

  DEVICE bool has(u32 of, int token) const { return of < key || (of == key && token <= id); }
  DEVICE void end_with(u64 token) { key = u32(token >> 32), id = int(u32(token)); }
};

// Tokens as key and id in one number, which sorts them. `count` may be more than there is room for.
struct List {
  u64 tokens[LISTED];
  int count;
};

// Counts and weights by bin. A weight of 41 bits is in three parts, so that no sum of them leaves 32 bits.
struct Histogram {
  u32 count[BINS], weight[3][BINS];
};

// To be called by whole warps. A thread's place in the list is nobody's business: it will be sorted.
DEVICE void append(List& list, bool wanted, u32 key, int id) {
  const u32 who = __ballot_sync(FULL_WARP, wanted);
  if (!who) return;
  const int lane = threadIdx.x & 31;
  int at = 0;
  if (lane == 0) at = atomicAdd(&list.count, __popc(who));
  at = __shfl_sync(FULL_WARP, at, 0) + __popc(who & ((1u << lane) - 1));
  if (wanted && at < LISTED) list.tokens[at] = u64(key) << 32 | u32(id);
}

// Bitonic (Batcher 1968).
DEVICE void sort(List& list) {
  int size = 64;
  while (size < list.count) size *= 2;
  for (int i = list.count + threadIdx.x; i < size; i += CHOOSERS) list.tokens[i] = ~u64(0);
  __syncthreads();
  for (int run = 2; run <= size; run *= 2)
    for (int apart = run / 2; apart > 0; apart /= 2) {
      for (int i = threadIdx.x; i < size / 2; i += CHOOSERS) {
        const int low = (i & ~(apart - 1)) * 2 | (i & (apart - 1)), high = low | apart;
        const u64 a = list.tokens[low], b = list.tokens[high];
        if ((a > b) == ((low & run) == 0)) list.tokens[low] = b, list.tokens[high] = a;
      }
      __syncthreads();
    }
}

// Of a sorted list's first `count`, the first with which `before` and their weights reach `enough`; `count` if none
// does. `sum` is that of all their weights.
DEVICE int first_to_reach(const List& list, int count, double before, double enough, double& sum, Scratch& scratch) {
  constexpr int EACH = LISTED / CHOOSERS;
  double weights[EACH], own = 0.;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = threadIdx.x * EACH + e;
    own += weights[e] = i < count ? double(Scale::weight(u32(list.tokens[i] >> 32))) : 0.;
  }
  double at = before + block_scan(own, sum, scratch) - own;
  if (threadIdx.x == 0) scratch.first = count;
  __syncthreads();
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = threadIdx.x * EACH + e;
    at += weights[e];
    if (i < count && at >= enough) {
      atomicMin(&scratch.first, i);
      break;
    }
  }
  __syncthreads();
  return scratch.first;
}

// One of a list's first `count` tokens, by the share of their weights, in the order of their ids. The list is sorted
// anew: by id. What weighs less than `least` is left out.
DEVICE int draw(List& list, int count, double least, double u, Scratch& scratch) {
  constexpr int EACH = LISTED / CHOOSERS;
  for (int i = threadIdx.x; i < count; i += CHOOSERS) {
    const u64 token = list.tokens[i];
    const bool stays = double(Scale::weight(u32(token >> 32))) >= least;
    list.tokens[i] = stays ? token << 32 | token >> 32 : ~u64(0);
  }
  __syncthreads();
  if (threadIdx.x == 0) list.count = count, scratch.first = LISTED, scratch.last = 0;
  __syncthreads();
  sort(list);
  double weights[EACH], own = 0., total;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int i = threadIdx.x * EACH + e;
    const u64 token = i < count ? list.tokens[i] : ~u64(0);
    own += weights[e] = token != ~u64(0) ? double(Scale::weight(u32(token))) : 0.;
  }
  double at = block_scan(own, total, scratch) - own;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    at += weights[e];
    if (!(weights[e] > 0.)) continue;
    if (at > u * total) atomicMin(&scratch.first, threadIdx.x * EACH + e);
    atomicMax(&scratch.last, threadIdx.x * EACH + e);
  }
  __syncthreads();
  // Rounding may leave no end beyond the target: then the last token that can be.
  return int(list.tokens[scratch.first < LISTED ? scratch.first : scratch.last] >> 32);
}

// The bin in which counts, or weights, reach `enough`: BINS if none; what is in the bins before; what is in all.
struct Border {
  int bin;
  double before, total;
};

template <bool COUNT>
DEVICE Border border_of(const Histogram& histogram, double enough, Scratch& scratch) {
  constexpr int EACH = BINS / CHOOSERS;
  u64 measure[EACH], own = 0, ends;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int bin = threadIdx.x * EACH + e;
    measure[e] = COUNT ? histogram.count[bin]
                       : (u64(histogram.weight[2][bin]) << 28) + (u64(histogram.weight[1][bin]) << 14) +
                             histogram.weight[0][bin];
    own += measure[e];
  }
  // Below 2^53 all of it is exact.
  const double unit = COUNT ? 1. : 1. / double(WEIGHT_ONE);
  double total;
  ends = u64(block_scan(double(own), total, scratch));
  if (threadIdx.x == 0) scratch.first = BINS, scratch.before = 0.;
  __syncthreads();
  u64 at = ends - own;
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    if (double(at) * unit < enough && double(at + measure[e]) * unit >= enough) {
      scratch.first = threadIdx.x * EACH + e;  // one thread's, since the sums grow
      scratch.before = double(at) * unit;
    }
    at += measure[e];
  }
  __syncthreads();
  return {scratch.first, scratch.before, total * unit};
}
