// From logits to a token: what edgellm/executor/sampler.py does with a row.
//
// A row is cut into segments of 128 logits, which several blocks part among them. Each changes of its logits what the
// request wants changed, and notes of each segment the largest logit and the sum of weights. The block that ends last
// takes the argmax of the segments, or finds which tokens top_k, top_p and min_p keep and draws among them in the order of
// their ids.
#include "adjust.cuh"
#include "rows.cuh"
#include "sample.cuh"
#include "truncate.cuh"

struct Summary {
  float largest;  // infinite where a logit is NaN or +inf; never −0
  int id;         // the first with the largest logit
  float weight;   // sum of e^((x − largest) / temperature)
  float raw;      // sum of e^(x − largest), where a log-probability is wanted
};

// Orders as the float does, which is not NaN.
DEVICE u32 ordered(float v) {
  const u32 bits = __float_as_uint(v);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

DEVICE float unordered(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// A lane's logits of a segment: neighbours where rows begin at multiples of 16 bytes.
template <int VOCAB> struct Lane {
  static constexpr bool WIDE = VOCAB % 4 == 0;
  float x[4];

  DEVICE static int id(int segment, int i) {
    const int lane = threadIdx.x & 31;
    return segment * SEGMENT + (WIDE ? lane * 4 + i : i * 32 + lane);
  }

  DEVICE void load(const float* logits, int segment) {
    if constexpr (WIDE) {
      const float4 four = id(segment, 0) < VOCAB ? load_l2((const float4*)(logits + id(segment, 0)))
                                                 : make_float4(-INFINITE, -INFINITE, -INFINITE, -INFINITE);
      x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = id(segment, i) < VOCAB ? load_l2(logits + id(segment, i)) : -INFINITE;
    }
  }
};

// By a warp; of lane 0.
template <int VOCAB> DEVICE Summary summary_of(const Lane<VOCAB>& lane, int segment, u32 flags, float inverse_temperature) {
  float best = -INFINITE;
  int id = ANY_ID;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    finite &= lane.x[i] < INFINITE;  // not so of NaN
    if (lane.x[i] > best) best = lane.x[i], id = lane.id(segment, i);
  }
  // −0 is as large as 0.
  const u32 key = ordered(best + 0.f), top = __reduce_max_sync(FULL_WARP, key);
  id = __reduce_min_sync(FULL_WARP, u32(key == top ? id : ANY_ID));
  finite = __all_sync(FULL_WARP, finite);
  best = unordered(top);
  float weight = 0.f, raw = 0.f;
  if (finite && best > -INFINITE) {
    if (!(flags & GREEDY)) {
#pragma unroll
      for (int i = 0; i < 4; i++) weight += expf(__fmul_rn(__fsub_rn(lane.x[i], best), inverse_temperature));
      weight = warp_sum(weight);
    }
    if (flags & LOGPROB) {
#pragma unroll
      for (int i = 0; i < 4; i++) raw += expf(lane.x[i] - best);
      raw = warp_sum(raw);
    }
  }
  return {finite ? best : INFINITE, id, weight, raw};
}

// A token's weight, 0 if it is not kept.
template <int VOCAB>
DEVICE float weight_if_kept(int id, const float* logits, const Scale& scale, const Kept& kept, double min_p) {
  if (id >= VOCAB) return 0.f;
  const u32 key = scale.key(load_l2(logits + id));
  const float weight = Scale::weight(key);
  return kept.has(key, id) && double(weight) >= min_p ? weight : 0.f;
}

// Every segment's sum of what is kept of it.
template <int VOCAB>
DEVICE void weigh_kept(float* weights, const float* largest, const float* logits, const Scale& scale, const Kept& kept,
                       double min_p) {
  constexpr int SEGMENTS = (VOCAB + SEGMENT - 1) / SEGMENT;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();
  for (int segment = warp; segment < SEGMENTS; segment += CHOOSER_WARPS) {
    float sum = 0.f;
    const u32 key = scale.key(largest[segment]);
    if (key <= kept.key && double(Scale::weight(key)) >= min_p) {
#pragma unroll
      for (int i = 0; i < 4; i++)
        sum += weight_if_kept<VOCAB>(segment * SEGMENT + i * 32 + lane, logits, scale, kept, min_p);
      sum = warp_sum(sum);
    }
    if (lane == 0) weights[segment] = sum;
  }
}

// A kept token, by the share of the weights, in the order of ids: first the segment, then the token in it.
template <int VOCAB>
DEVICE int draw_by_segments(const float* weights, const float* logits, const Scale& scale, const Kept& kept, double min_p,
                            double u, Scratch& scratch) {
  constexpr int SEGMENTS = (VOCAB + SEGMENT - 1) / SEGMENT, EACH = (SEGMENTS + CHOOSERS - 1) / CHOOSERS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  __syncthreads();
  if (threadIdx.x == 0) scratch.first = ANY_ID, scratch.last = -1;

  // Neighbours belong to one thread.
  double own = 0.;
  for (int e = 0; e < EACH; e++) {
    const int segment = threadIdx.x * EACH + e;
    if (segment < SEGMENTS) own += weights[segment];
  }
  double total;
  const double ends = block_scan(own, total, scratch);
  const double target = u * total;
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
    scratch.segment = chosen;
    scratch.before = target - start;
  }
  __syncthreads();
  if (warp == 0) {
    const int segment = scratch.segment;
    float w[4];
    double sum = 0.;
#pragma unroll
    for (int i = 0; i < 4; i++) sum += w[i] = weight_if_kept<VOCAB>(segment * SEGMENT + lane * 4 + i, logits, scale, kept, min_p);
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
  return scratch.first;
}

// Grid: (blocks, rows). `counters`, one for each row, are 0 before and after. A slot's state is what the host or the graph
// before left, so it is read before the wait: once in a graph.
template <int VOCAB, int BIASES, int SUPPRESSED, int SEEN>
__global__ void __launch_bounds__(CHOOSERS, 1)
    sample(const Row* __restrict__ rows, Sampling* sampling, Adjustments<BIASES, SUPPRESSED, SEEN>* adjustments,
           float* logits, u32* counters, Summary* summaries, int* last_token, Sampled* results) {
  constexpr int SEGMENTS = (VOCAB + SEGMENT - 1) / SEGMENT, EACH = (SEGMENTS + CHOOSERS - 1) / CHOOSERS;
  __shared__ Scratch scratch;
  __shared__ float largest[SEGMENTS], weights[SEGMENTS];
  __shared__ Room room;
  __shared__ u64 best[CHOOSER_WARPS];
  __shared__ float lowest[CHOOSER_WARPS];

  launch_dependents();
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Row row = rows[blockIdx.y];
  Sampled* const result = results + blockIdx.y;
  if (row.slot < 0 || !(row.flags & WANTS_TOKEN)) {
    wait_for_previous();
    if (blockIdx.x == 0 && threadIdx.x == 0) *result = {-1, NONE, __int_as_float(0x7fc00000), 0};
    return;
  }
  Sampling* const mine = sampling + row.slot;
  const u32 flags = load_l2(&mine->flags), index = load_l2(&mine->index);
  const float inverse_temperature = load_l2(&mine->inverse_temperature);
  float* const from = logits + u64(blockIdx.y) * VOCAB;
  Summary* const of = summaries + u64(blockIdx.y) * SEGMENTS;
  const int begin = SEGMENTS * blockIdx.x / gridDim.x, end = SEGMENTS * (blockIdx.x + 1) / gridDim.x;
  wait_for_previous();

  if (flags & ADJUSTED) {
    const int last = load_l2(last_token + row.slot);
    adjust(adjustments[row.slot], index, last, from, begin * SEGMENT, end * SEGMENT, scratch.first);
  }
  Lane<VOCAB> here, next;
  here.load(from, begin + warp < end ? begin + warp : SEGMENTS);
  for (int segment = begin + warp; segment < end; segment += CHOOSER_WARPS, here = next) {
    next.load(from, segment + CHOOSER_WARPS < end ? segment + CHOOSER_WARPS : SEGMENTS);
    const Summary found = summary_of(here, segment, flags, inverse_temperature);
    if (lane == 0) of[segment] = found;
  }
  __syncthreads();
  if (threadIdx.x == 0) scratch.last = count_arrival(counters + blockIdx.y, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!scratch.last) return;
  if (flags & ADJUSTED) count_token(adjustments[row.slot], index, load_l2(last_token + row.slot), scratch.first);
  Wishes wishes{1, 1., 0.};
  double u = 0.;
  if (!(flags & GREEDY)) {
    wishes = {load_l2(&mine->top_k), load_l2(&mine->top_p), load_l2(&mine->min_p)};
    u = philox_uniform(load_l2(&mine->seed_low), load_l2(&mine->seed_high), index);
    if (wishes.top_k >= VOCAB) wishes.top_k = 0;
  }

  // The largest logit, of equal ones the first: as one number, of which the largest is wanted.
  u64 top = 0;
  float raw[EACH];
  for (int e = 0; e < EACH; e++) {
    const int segment = e * CHOOSERS + threadIdx.x;
    raw[e] = 0.f;
    if (segment < SEGMENTS) {
      const uint4 w = load_l2((const uint4*)(of + segment));
      const u64 candidate = u64(ordered(__uint_as_float(w.x))) << 32 | ~w.y;
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
  const float peak = unordered(u32(top >> 32));
  if (!(fabsf(peak) < INFINITE) || flags & ON_HOST) {
    const bool emptied = flags & ADJUSTED && peak == -INFINITE;  // by what the request holds back
    const int status = emptied ? NOTHING_LEFT : fabsf(peak) < INFINITE ? FOR_HOST : NOT_FINITE;
    if (threadIdx.x == 0) *result = {-1, status, __int_as_float(0x7fc00000), index};
    return;
  }
  int token = int(~u32(top));

  if (wishes.top_k != 1) {
    const bool truncated = wishes.few() || wishes.nucleus() || wishes.likely();
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
    int listed = 0;  // tokens of the list that are kept, if it has all of them
    if (truncated) {
      // Three times as far down as the segments' largest go there is not much left.
#pragma unroll
      for (int w = 0; w < CHOOSER_WARPS; w++) low = fminf(low, lowest[w]);
      scale.bins = float(BINS) / fminf(fmaxf(-3.f * scale.scaled(low), 1e-6f), 1e6f);

      const int bound = list_candidates<VOCAB>(room, largest, from, scale, wishes, scratch);
      if (bound < BINS) listed = keep_candidates<VOCAB>(room.list, bound, weights, wishes, scratch);
      __syncthreads();
      if (!listed && wishes.few()) narrow<VOCAB, true>(kept, wishes.top_k, room.list, room.histogram, from, scale, scratch);
      if (!listed && wishes.nucleus()) narrow<VOCAB, false>(kept, wishes.top_p, room.list, room.histogram, from, scale, scratch);
    }

    if (listed) {
      token = draw(room.list, listed, wishes.min_p, u, scratch);
    } else {
      if (truncated) weigh_kept<VOCAB>(weights, largest, from, scale, kept, wishes.min_p);
      token = draw_by_segments<VOCAB>(weights, from, scale, kept, wishes.min_p, u, scratch);
    }
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
