// Which tokens of a row top_k, top_p and min_p keep.
//
// A few hundred candidates are sorted, the tokens at least as likely as some segment's largest. Where they do not
// reach far enough, a histogram of the row says in which bin the kept set ends, and that bin's tokens are sorted.
// What is added in no fixed order is added as integers: the same logits always give the same token.
#pragma once

#include "likelihood.cuh"

constexpr int SEGMENT = 128;        // logits
constexpr int FIRST_NUCLEUS = 128;  // segments whose largest are candidates for top_p

union Room {
  List list;
  Histogram histogram;
};

// A request's wishes; top_k 0 where it has none.
struct Wishes {
  int top_k;
  double top_p, min_p;

  DEVICE bool few() const { return top_k > 0; }
  DEVICE bool nucleus() const { return top_p < 1.; }
  DEVICE bool likely() const { return min_p > 0.; }
};

// All tokens of a row, several at a time for each thread; `look` is called by whole warps, with an id that may lie
// beyond the vocabulary.
template <int VOCAB, class Look>
DEVICE void each_token(const float* logits, Look look) {
  constexpr int TOGETHER = 4, WIDE = VOCAB % 4 == 0 ? 4 : 1;
#pragma unroll 1
  for (int start = 0; start < VOCAB; start += TOGETHER * WIDE * CHOOSERS) {
    float x[TOGETHER][WIDE];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int id = start + (i * CHOOSERS + int(threadIdx.x)) * WIDE;
      if constexpr (WIDE == 4) {
        const float4 four = id < VOCAB ? load_l2((const float4*)(logits + id))
                                       : make_float4(-INFINITE, -INFINITE, -INFINITE, -INFINITE);
        x[i][0] = four.x, x[i][1] = four.y, x[i][2] = four.z, x[i][3] = four.w;
      } else {
        x[i][0] = id < VOCAB ? load_l2(logits + id) : -INFINITE;
      }
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
#pragma unroll
      for (int j = 0; j < WIDE; j++) look(x[i][j], start + (i * CHOOSERS + int(threadIdx.x)) * WIDE + j);
  }
}

template <int VOCAB, bool COUNT>
DEVICE void take_histogram(Histogram& histogram, const float* logits, const Scale& scale, const Kept& kept) {
  for (int bin = threadIdx.x; bin < BINS; bin += CHOOSERS)
    histogram.count[bin] = histogram.weight[0][bin] = histogram.weight[1][bin] = histogram.weight[2][bin] = 0;
  __syncthreads();
  each_token<VOCAB>(logits, [&](float x, int id) {
    const u32 key = scale.key(x);
    if (!kept.has(key, id)) return;
    const int bin = scale.bin(key);
    if (COUNT) {
      atomicAdd(&histogram.count[bin], 1);
      return;
    }
    const u64 weight = Scale::exact(Scale::weight(key));
    const u32 parts[3] = {u32(weight) & 0x3fff, u32(weight >> 14) & 0x3fff, u32(weight >> 28)};
#pragma unroll
    for (int i = 0; i < 3; i++)
      if (parts[i]) atomicAdd(&histogram.weight[i][bin], parts[i]);
  });
  __syncthreads();
}

// The kept tokens of one bin, sorted; false if they are too many.
template <int VOCAB>
DEVICE bool list_bin(List& list, int bin, const float* logits, const Scale& scale, const Kept& kept) {
  __syncthreads();
  if (threadIdx.x == 0) list.count = 0;
  __syncthreads();
  each_token<VOCAB>(logits, [&](float x, int id) {
    const u32 key = scale.key(x);
    append(list, kept.has(key, id) && scale.bin(key) == bin, key, id);
  });
  __syncthreads();
  if (list.count > LISTED) return false;
  sort(list);
  return true;
}

// The smallest number of 31 bits such that the kept tokens whose number is at most that are `enough`, or weigh as
// much: two bits of it at a time. Slow, and right however many tokens are alike.
template <int VOCAB, class Number, class Measure>
DEVICE u32 search(const float* logits, double enough, Scratch& scratch, Number number, Measure measure) {
  u32 found = 0;
#pragma unroll 1
  for (int shift = 29; shift >= -1; shift -= 2) {
    // The last bit is alone.
    const u32 low = shift < 0 ? found + 1 : found + (1u << shift), middle = shift < 0 ? low : found + (2u << shift);
    const u32 high = shift < 0 ? low : found + (3u << shift);
    u64 sums[3] = {};
    each_token<VOCAB>(logits, [&](float x, int id) {
      const u32 n = number(x, id);
      const u64 m = measure(x, id);
      sums[0] += n < low ? m : 0, sums[1] += n < middle ? m : 0, sums[2] += n < high ? m : 0;
    });
    block_sums(sums, scratch);
    if (shift < 0)
      found += double(sums[0]) < enough;
    else
      found += u32((double(sums[0]) < enough) + (double(sums[1]) < enough) + (double(sums[2]) < enough)) << shift;
  }
  return found;
}

// Narrow `kept` to its first tokens that are, or weigh, `enough`, without a list.
template <int VOCAB, bool COUNT>
DEVICE void narrow_slowly(Kept& kept, double enough, const float* logits, const Scale& scale, Scratch& scratch) {
  auto key_of = [&](float x, int) { return scale.key(x); };
  auto measure = [&](float x, int id) {
    const u32 key = id < VOCAB ? scale.key(x) : ~0u;
    return !kept.has(key, id) ? u64(0) : COUNT ? u64(1) : Scale::exact(Scale::weight(key));
  };
  if (!COUNT) enough *= double(WEIGHT_ONE);
  const u32 last = search<VOCAB>(logits, enough, scratch, key_of, measure);
  if (last > LAST_KEY) return;
  u64 before[1] = {};
  each_token<VOCAB>(logits, [&](float x, int id) { before[0] += scale.key(x) < last ? measure(x, id) : 0; });
  block_sums(before, scratch);
  const double missing = enough - double(before[0]);
  const double one = COUNT ? 1. : double(Scale::exact(Scale::weight(last)));
  const double wanted = one > 0. ? fmax(ceil(missing / one), 1.) : double(VOCAB);
  const u32 id = search<VOCAB>(logits, wanted, scratch, [](float, int token) { return u32(token); },
                               [&](float x, int token) { return u64(scale.key(x) == last && kept.has(last, token)); });
  if (last < kept.key || int(id) < kept.id) kept.key = last, kept.id = int(min(id, u32(ANY_ID)));
}

// Narrow `kept` to its first tokens that are `enough`, or weigh enough (a share of what is kept), by a histogram.
template <int VOCAB, bool COUNT>
DEVICE void narrow(Kept& kept, double enough, List& list, Histogram& histogram, const float* logits, const Scale& scale,
                   Scratch& scratch) {
  take_histogram<VOCAB, COUNT>(histogram, logits, scale, kept);
  Border border = border_of<COUNT>(histogram, enough, scratch);
  if (!COUNT) {
    enough *= border.total;
    border = border_of<COUNT>(histogram, enough, scratch);
  }
  if (border.bin == BINS) return;  // all that is kept is not too much
  if (!list_bin<VOCAB>(list, border.bin, logits, scale, kept)) {
    narrow_slowly<VOCAB, COUNT>(kept, enough, logits, scale, scratch);
    return;
  }
  int at = int(enough - border.before) - 1;
  double sum;
  if (!COUNT) at = first_to_reach(list, list.count, border.before, enough, sum, scratch);
  // Weights were rounded otherwise for the histogram.
  kept.end_with(list.tokens[min(at, list.count - 1)]);
  __syncthreads();
}

// List the candidates, sorted: all tokens in the bins of the `rank` largest segments, of which there are `rank` or
// more, or all that min_p can keep. Gives the last bin that was looked at, BINS if there are too many to list.
template <int VOCAB>
DEVICE int list_candidates(Room& room, const float* largest, const float* logits, const Scale& scale,
                           const Wishes& wishes, Scratch& scratch) {
  constexpr int SEGMENTS = (VOCAB + SEGMENT - 1) / SEGMENT;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int rank = wishes.few() ? wishes.top_k : wishes.nucleus() ? max(1, min(FIRST_NUCLEUS, SEGMENTS / 2)) : 1;
  int bound = BINS - 1;
  if (!wishes.few() && !wishes.nucleus()) {
    // A little more than min_p keeps, since log and exp round.
    bound = scale.bin(__float_as_uint(fmaxf(1e-3f - logf(float(wishes.min_p)), 0.f)));
  } else if (rank < SEGMENTS) {
    for (int bin = threadIdx.x; bin < BINS; bin += CHOOSERS) room.histogram.count[bin] = 0;
    __syncthreads();
    for (int segment = threadIdx.x; segment < SEGMENTS; segment += CHOOSERS) {
      const u32 key = scale.key(largest[segment]);
      if (key <= LAST_KEY) atomicAdd(&room.histogram.count[scale.bin(key)], 1);
    }
    __syncthreads();
    bound = min(border_of<true>(room.histogram, rank, scratch).bin, BINS - 1);
  }
  __syncthreads();
  const bool listable = rank < LISTED && (bound < BINS - 1 || VOCAB <= LISTED);
  if (threadIdx.x == 0) room.list.count = listable ? 0 : LISTED + 1;
  __syncthreads();
  // Neighbouring segments go to different warps: likely tokens are often near each other.
  for (int start = warp; listable && start < SEGMENTS; start += CHOOSERS) {
    const int segment = start + lane * CHOOSER_WARPS;
    u32 wanted = __ballot_sync(FULL_WARP, segment < SEGMENTS && scale.bin(scale.key(largest[segment])) <= bound);
    while (wanted) {
      constexpr int TOGETHER = 4;
      float x[TOGETHER][4];
      int first[TOGETHER];
#pragma unroll
      for (int n = 0; n < TOGETHER; n++) {
        first[n] = wanted ? (start + (__ffs(wanted) - 1) * CHOOSER_WARPS) * SEGMENT + lane : VOCAB;
        wanted &= wanted - 1;
#pragma unroll
        for (int i = 0; i < 4; i++)
          x[n][i] = first[n] + i * 32 < VOCAB ? load_l2(logits + first[n] + i * 32) : -INFINITE;
      }
#pragma unroll
      for (int n = 0; n < TOGETHER; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 key = scale.key(x[n][i]);
          append(room.list, key <= LAST_KEY && scale.bin(key) <= bound, key, first[n] + i * 32);
        }
    }
  }
  __syncthreads();
  if (room.list.count > LISTED) return BINS;
  sort(room.list);
  return bound;
}

// How many of the candidates are kept, 0 if that is more than there are. `weights` are the segments' sums.
template <int VOCAB>
DEVICE int keep_candidates(const List& list, int bound, const float* weights, const Wishes& wishes, Scratch& scratch) {
  constexpr int SEGMENTS = (VOCAB + SEGMENT - 1) / SEGMENT;
  const int count = wishes.few() ? min(wishes.top_k, list.count) : list.count;
  if (!wishes.nucleus()) return count;
  double sum, total = 0.;
  if (wishes.few()) {
    first_to_reach(list, count, 0., 0., total, scratch);
  } else {
    for (int segment = threadIdx.x & 31; segment < SEGMENTS; segment += 32) total += weights[segment];
#pragma unroll
    for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(FULL_WARP, total, o);
  }
  const int last = first_to_reach(list, count, 0., wishes.top_p * total, sum, scratch);
  if (last < count) return last + 1;
  return wishes.few() || bound == BINS - 1 ? count : 0;
}
