// From logits to a token: what edgellm/executor/sampler.py does with a row that nothing adjusts.
//
// A row is cut into segments of 128 logits. `summarise` notes of each its largest logit and its sum of weights, on the
// whole device. `choose` is one block for each row: it takes the argmax of the segments, or finds which tokens
// top_k, top_p and min_p keep and draws among them in the order of their ids. Segments without a token that is kept
// are not looked at again, so that it rarely reads more than a few of them.
//
// A kept set is a prefix of the tokens by likelihood, equal ones by id. It is written as the key of its last token
// (a key is 0 for the largest logit and grows as they fall) and that token's id. To find it, a few hundred candidates
// are sorted, the tokens at least as likely as some segment's largest. Where they do not reach far enough, a
// histogram of the row says in which bin the set ends, and that bin's tokens are sorted. What is added in no fixed
// order is added as integers: the same logits always give the same token.
#include "rows.cuh"
#include "sample.cuh"

constexpr int SEGMENT = 128;
constexpr int CHOOSERS = 512;  // threads
constexpr int CHOOSER_WARPS = CHOOSERS / 32;
constexpr int LISTED = 2048;         // tokens that can be sorted
constexpr int BINS = 1024;           // of a histogram
constexpr int FIRST_NUCLEUS = 128;   // segments whose largest are candidates for top_p
constexpr float WEIGHT_ONE = 1099511627776.f;  // 2^40, a weight of 1 as an integer
constexpr u32 LAST_KEY = 0x7f7fffffu;          // of a logit that is far below, but not −inf
constexpr int ANY_ID = 0x7fffffff;

struct Summary {
  float largest;  // infinite where a logit is NaN or +inf
  int id;         // the first with the largest logit
  float weight;   // sum of e^((x − largest) / temperature)
  float raw;      // sum of e^(x − largest), where a log-probability is wanted
};

// Grid: (segments / 8, rows).
template <int VOCAB>
__global__ void __launch_bounds__(256)
    summarise(const Row* __restrict__ rows, const Sampling* sampling, const float* logits, Summary* summaries) {
  constexpr int SEGMENTS = (VOCAB + SEGMENT - 1) / SEGMENT;
  launch_dependents();
  const int lane = threadIdx.x & 31, segment = blockIdx.x * 8 + (threadIdx.x >> 5);
  const Row row = rows[blockIdx.y];
  wait_for_previous();
  if (segment >= SEGMENTS || row.slot < 0 || !(row.flags & WANTS_TOKEN)) return;
  const u32 flags = load_l2(&sampling[row.slot].flags);
  const float inverse_temperature = load_l2(&sampling[row.slot].inverse_temperature);
  const float* const from = logits + u64(blockIdx.y) * VOCAB;
  float x[4], best = -INFINITE;
  int id = ANY_ID;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = segment * SEGMENT + i * 32 + lane;
    x[i] = at < VOCAB ? load_l2(from + at) : -INFINITE;
    finite &= x[i] < INFINITE;  // not so of NaN
    if (x[i] > best) best = x[i], id = at;
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const float other = __shfl_xor_sync(FULL_WARP, best, o);
    const int other_id = __shfl_xor_sync(FULL_WARP, id, o);
    if (other > best || (other == best && other_id < id)) best = other, id = other_id;
  }
  finite = __all_sync(FULL_WARP, finite);
  float weight = 0.f, raw = 0.f;
  if (finite && best > -INFINITE) {
    if (!(flags & GREEDY)) {
#pragma unroll
      for (int i = 0; i < 4; i++) weight += expf(__fmul_rn(__fsub_rn(x[i], best), inverse_temperature));
      weight = warp_sum(weight);
    }
    if (flags & LOGPROB) {
#pragma unroll
      for (int i = 0; i < 4; i++) raw += expf(x[i] - best);
      raw = warp_sum(raw);
    }
  }
  if (lane == 0) summaries[u64(blockIdx.y) * SEGMENTS + segment] = {finite ? best : INFINITE, id, weight, raw};
}

// ---- sums over the block

struct Scratch {
  u64 sums[CHOOSER_WARPS][4];
  double ends[CHOOSER_WARPS], before;
  int first, last;
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
  const int lane = threadIdx.x & 31;
  int at = 0;
  if (who && lane == 0) at = atomicAdd(&list.count, __popc(who));
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

// All tokens of a row, several at a time for each thread; `look` is called by whole warps, with an id that may lie
// beyond the vocabulary.
template <int VOCAB, class Look>
DEVICE void each_token(const float* logits, Look look) {
  constexpr int TOGETHER = 8;
#pragma unroll 1
  for (int start = 0; start < VOCAB; start += TOGETHER * CHOOSERS) {
    float x[TOGETHER];
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      const int id = start + i * CHOOSERS + threadIdx.x;
      x[i] = id < VOCAB ? load_l2(logits + id) : -INFINITE;
    }
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) look(x[i], start + i * CHOOSERS + int(threadIdx.x));
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

// One block for each row.
template <int VOCAB>
__global__ void __launch_bounds__(CHOOSERS, 1) choose(const Row* __restrict__ rows, Sampling* sampling, const float* logits,
                                                   const Summary* summaries, int* last_token, Sampled* results) {
  constexpr int SEGMENTS = (VOCAB + SEGMENT - 1) / SEGMENT, EACH = (SEGMENTS + CHOOSERS - 1) / CHOOSERS;
  __shared__ Scratch scratch;
  __shared__ float largest[SEGMENTS], weights[SEGMENTS];
  __shared__ union { List list; Histogram histogram; } room;
  __shared__ u64 best[CHOOSER_WARPS];
  __shared__ float lowest[CHOOSER_WARPS];

  launch_dependents();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Row row = rows[blockIdx.x];
  wait_for_previous();
  Sampled* const result = results + blockIdx.x;
  if (row.slot < 0 || !(row.flags & WANTS_TOKEN)) {
    if (threadIdx.x == 0) *result = {-1, NONE, __int_as_float(0x7fc00000), 0};
    return;
  }
  Sampling* const mine = sampling + row.slot;
  const u32 flags = load_l2(&mine->flags), index = load_l2(&mine->index);
  const float* const from = logits + u64(blockIdx.x) * VOCAB;
  const Summary* const of = summaries + u64(blockIdx.x) * SEGMENTS;

  // The largest logit, of equal ones the first: as one number, of which the largest is wanted.
  u64 top = 0;
  float raw[EACH];
  for (int e = 0; e < EACH; e++) {
    const int segment = e * CHOOSERS + threadIdx.x;
    raw[e] = 0.f;
    if (segment < SEGMENTS) {
      const uint4 w = load_l2((const uint4*)(of + segment));
      const u32 ordered = w.x & 0x80000000u ? ~w.x : w.x | 0x80000000u;
      const u64 candidate = u64(ordered) << 32 | ~w.y;
      top = candidate > top ? candidate : top;
      largest[segment] = __uint_as_float(w.x);
      weights[segment] = __uint_as_float(w.z);
      raw[e] = __uint_as_float(w.w);
    }
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const u64 other = __shfl_xor_sync(FULL_WARP, top, o);
    top = other > top ? other : top;
  }
  if (lane == 0) best[warp] = top;
  __syncthreads();
  top = best[lane % CHOOSER_WARPS];
#pragma unroll
  for (int o = 16; o; o >>= 1) {
    const u64 other = __shfl_xor_sync(FULL_WARP, top, o);
    top = other > top ? other : top;
  }
  const u32 ordered = u32(top >> 32);
  const float peak = __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
  if (!(fabsf(peak) < INFINITE) || flags & ON_HOST) {
    const int status = fabsf(peak) < INFINITE ? FOR_HOST : NOT_FINITE;
    if (threadIdx.x == 0) *result = {-1, status, __int_as_float(0x7fc00000), index};
    return;
  }
  int token = int(~u32(top));

  const int top_k = load_l2(&mine->top_k);
  if (!(flags & GREEDY) && top_k != 1) {
    const float inverse_temperature = load_l2(&mine->inverse_temperature);
    const double top_p = load_l2(&mine->top_p), min_p = load_l2(&mine->min_p);
    const bool few = 0 < top_k && top_k < VOCAB, nucleus = top_p < 1., likely = min_p > 0.;
    Scale scale{peak, inverse_temperature, 1.f};

    // Every segment's share of all weights.
    float low = peak;
    for (int segment = threadIdx.x; segment < SEGMENTS; segment += CHOOSERS) {
      weights[segment] = weights[segment] > 0.f ? weights[segment] * Scale::weight(scale.key(largest[segment])) : 0.f;
      if (largest[segment] > -INFINITE) low = fminf(low, largest[segment]);
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) low = fminf(low, __shfl_xor_sync(FULL_WARP, low, o));
    if (lane == 0) lowest[warp] = low;
    __syncthreads();

    Kept kept;
    if (few || nucleus) {
      // Three times as far down as the segments' largest go there is not much left.
#pragma unroll
      for (int w = 0; w < CHOOSER_WARPS; w++) low = fminf(low, lowest[w]);
      scale.bins = float(BINS) / fminf(fmaxf(-3.f * scale.scaled(low), 1e-6f), 1e6f);

      // Candidates: all tokens in the bins of the `rank` largest segments. There are `rank` of them or more.
      const int rank = few ? top_k : max(1, min(FIRST_NUCLEUS, SEGMENTS / 2));
      int bound = BINS - 1;
      if (rank < SEGMENTS) {
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
      if (listable)
        for (int segment = warp; segment < SEGMENTS; segment += CHOOSER_WARPS) {
          if (scale.bin(scale.key(largest[segment])) > bound) continue;
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int id = segment * SEGMENT + i * 32 + lane;
            const u32 key = id < VOCAB ? scale.key(load_l2(from + id)) : ~0u;
            append(room.list, key <= LAST_KEY && scale.bin(key) <= bound, key, id);
          }
        }
      __syncthreads();

      bool done = false;
      if (room.list.count <= LISTED) {
        sort(room.list);
        const int count = few ? min(top_k, room.list.count) : room.list.count;
        int last = count;
        if (nucleus) {
          double sum, total = 0.;
          if (few) {
            first_to_reach(room.list, count, 0., 0., total, scratch);
          } else {
            for (int segment = lane; segment < SEGMENTS; segment += 32) total += weights[segment];
#pragma unroll
            for (int o = 16; o; o >>= 1) total += __shfl_xor_sync(FULL_WARP, total, o);
          }
          last = first_to_reach(room.list, count, 0., top_p * total, sum, scratch) + 1;
        }
        done = few || last <= count || bound == BINS - 1;
        if (done) kept.end_with(room.list.tokens[min(last, count) - 1]);
      }
      __syncthreads();
      if (!done && few) narrow<VOCAB, true>(kept, top_k, room.list, room.histogram, from, scale, scratch);
      if (!done && nucleus) narrow<VOCAB, false>(kept, top_p, room.list, room.histogram, from, scale, scratch);
    }

    auto weight_if_kept = [&](int id) {
      if (id >= VOCAB) return 0.f;
      const u32 key = scale.key(load_l2(from + id));
      const float weight = Scale::weight(key);
      return kept.has(key, id) && (!likely || double(weight) >= min_p) ? weight : 0.f;
    };
    __syncthreads();
    if (few || nucleus || likely)
      for (int segment = warp; segment < SEGMENTS; segment += CHOOSER_WARPS) {
        float sum = 0.f;
        const u32 key = scale.key(largest[segment]);
        if (key <= kept.key && (!likely || double(Scale::weight(key)) >= min_p)) {
#pragma unroll
          for (int i = 0; i < 4; i++) sum += weight_if_kept(segment * SEGMENT + i * 32 + lane);
          sum = warp_sum(sum);
        }
        if (lane == 0) weights[segment] = sum;
      }
    if (threadIdx.x == 0) scratch.first = ANY_ID, scratch.last = -1;
    __syncthreads();

    // The segment in which u · sum falls: neighbours belong to one thread.
    double own = 0.;
    for (int e = 0; e < EACH; e++) {
      const int segment = threadIdx.x * EACH + e;
      if (segment < SEGMENTS) own += weights[segment];
    }
    double total;
    const double ends = block_scan(own, total, scratch);
    const double target = philox_uniform(load_l2(&mine->seed_low), load_l2(&mine->seed_high), index) * total;
    if (own > 0.) {
      if (ends > target) atomicMin(&scratch.first, int(threadIdx.x));
      atomicMax(&scratch.last, int(threadIdx.x));
    }
    __syncthreads();
    // Rounding may leave no end beyond the target: then the last token that can be.
    const bool beyond = scratch.first == ANY_ID;
    const int owner = beyond ? scratch.last : scratch.first;
    if (int(threadIdx.x) == owner) {
      double start = ends - own;
      int chosen = -1;
      for (int e = 0; e < EACH; e++) {
        const int segment = threadIdx.x * EACH + e;
        if (segment >= SEGMENTS || !(weights[segment] > 0.f)) continue;
        if (chosen >= 0) start += weights[chosen];
        chosen = segment;
        if (!beyond && start + weights[segment] > target) break;
      }
      scratch.last = chosen;
      scratch.before = target - start;
    }
    __syncthreads();
    if (warp == 0) {
      const int segment = scratch.last;
      float w[4];
      double sum = 0.;
#pragma unroll
      for (int i = 0; i < 4; i++) sum += w[i] = weight_if_kept(segment * SEGMENT + lane * 4 + i);
      double end = sum;
#pragma unroll
      for (int o = 1; o < 32; o <<= 1) {
        const double other = __shfl_up_sync(FULL_WARP, end, o);
        if (lane >= o) end += other;
      }
      const double all = __shfl_sync(FULL_WARP, end, 31);
      // The segment's sum was rounded otherwise.
      const double inside = scratch.before / double(weights[segment]) * all;
      const u32 beyonds = __ballot_sync(FULL_WARP, sum > 0. && end > inside && !beyond);
      const u32 any = __ballot_sync(FULL_WARP, sum > 0.);
      const int which = beyonds ? __ffs(beyonds) - 1 : 31 - __clz(any);
      if (lane == which) {
        double at = end - sum;
        int chosen = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (!(w[i] > 0.f)) continue;
          if (beyonds && at > inside) continue;
          chosen = i;
          at += w[i];
        }
        scratch.first = segment * SEGMENT + lane * 4 + chosen;
      }
    }
    __syncthreads();
    token = scratch.first;
  }

  float logprob = __int_as_float(0x7fc00000);
  if (flags & LOGPROB) {
    double sum = 0.;
    for (int e = 0; e < EACH; e++) {
      const int segment = e * CHOOSERS + threadIdx.x;
      if (segment < SEGMENTS && raw[e] > 0.f) sum += double(raw[e]) * double(expf(largest[segment] - peak));
    }
#pragma unroll
    for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(FULL_WARP, sum, o);
    __syncthreads();
    if (lane == 0) scratch.ends[warp] = sum;
    __syncthreads();
    sum = 0.;
    for (int w = 0; w < CHOOSER_WARPS; w++) sum += scratch.ends[w];
    logprob = float(double(load_l2(from + token) - peak) - log(sum));
  }
  if (threadIdx.x == 0) {
    *result = {token, CHOSEN, logprob, index};
    last_token[row.slot] = token;
    mine->index = index + 1;
  }
}
