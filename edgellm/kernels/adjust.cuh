// What a request wants changed of its logits before a token is chosen: biases, tokens that may not come yet, penalties
// for those that came. The arithmetic and its order are those of edgellm/executor/sampler.py.
#pragma once

#include "common.cuh"

struct Seen {
  int id;
  int count;  // 1 for a token of the prompt; one more for each time it was generated
};

// A slot's wishes and what it has seen; edgellm/kernels/adjust.py writes the same layout.
template <int BIASES, int SUPPRESSED, int SEEN>
struct Adjustments {
  static constexpr int ROOM = SEEN;
  float repetition, presence, frequency;
  u32 min_tokens;
  int biases, suppressed, seen;
  u32 counted;  // how many of the slot's tokens `history` has
  int bias_ids[BIASES];
  float bias[BIASES];
  int suppressed_ids[SUPPRESSED];
  Seen history[SEEN];
};

struct Penalties {
  float repetition, presence, frequency;

  template <class A>
  DEVICE explicit Penalties(const A& of)
      : repetition(load_l2(&of.repetition)), presence(load_l2(&of.presence)), frequency(load_l2(&of.frequency)) {}

  DEVICE bool any() const { return repetition != 1.f || presence != 0.f || frequency != 0.f; }

  // Of a token that was generated so often.
  DEVICE void take_off(float* at, int generated) const {
    float value = load_l2(at);
    if (repetition != 1.f) value = value > 0.f ? __fdiv_rn(value, repetition) : __fmul_rn(value, repetition);
    value = __fsub_rn(value, __fmul_rn(frequency, float(generated)));
    *at = __fsub_rn(value, generated > 0 ? presence : 0.f);
  }
};

// In place, what concerns logits begin … end − 1 of `x`, by all threads of a block, for the slot's token `index`. `last`,
// the one of before, need not have been counted yet. `found` is in shared memory.
template <class A>
DEVICE void adjust(const A& mine, u32 index, int last, float* x, int begin, int end, int& found) {
  auto here = [&](int id) { return id >= begin && id < end; };
  const Penalties penalties(mine);
  const bool counts = penalties.any(), uncounted = load_l2(&mine.counted) < index;
  const int biases = load_l2(&mine.biases), seen = load_l2(&mine.seen);
  if (threadIdx.x == 0) found = false;
  for (int i = threadIdx.x; i < biases; i += blockDim.x) {
    const int id = load_l2(mine.bias_ids + i);
    if (here(id)) x[id] = __fadd_rn(load_l2(x + id), load_l2(mine.bias + i));
  }
  __syncthreads();
  if (index < load_l2(&mine.min_tokens)) {
    const int suppressed = load_l2(&mine.suppressed);
    for (int i = threadIdx.x; i < suppressed; i += blockDim.x) {
      const int id = load_l2(mine.suppressed_ids + i);
      if (here(id)) x[id] = __int_as_float(0xff800000);
    }
  }
  __syncthreads();
  if (!counts) return;
  for (int i = threadIdx.x; i < seen; i += blockDim.x) {
    const int id = load_l2(&mine.history[i].id);
    if (!here(id)) continue;
    const bool again = uncounted && id == last;
    if (again) found = true;
    penalties.take_off(x + id, load_l2(&mine.history[i].count) - 1 + again);
  }
  __syncthreads();
  if (threadIdx.x == 0 && uncounted && here(last) && !found && seen < A::ROOM) penalties.take_off(x + last, 1);
  __syncthreads();
}

// Count the token of before, if that was not done yet; by all threads of one block.
template <class A>
DEVICE void count_token(A& mine, u32 index, int last, int& found) {
  if (!Penalties(mine).any() || load_l2(&mine.counted) >= index) return;
  const int seen = load_l2(&mine.seen);
  if (threadIdx.x == 0) found = false;
  __syncthreads();
  for (int i = threadIdx.x; i < seen; i += blockDim.x)
    if (load_l2(&mine.history[i].id) == last) {
      mine.history[i].count = load_l2(&mine.history[i].count) + 1;
      found = true;
    }
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool appended = !found && seen < A::ROOM;
    if (appended) mine.history[seen] = {last, 2};
    mine.counted = index;
    mine.seen = seen + appended;
  }
}
