// What a request wants changed of its logits before a token is chosen: biases, tokens that may not come yet, penalties
// for those that came. The arithmetic and its order are those of edgellm/executor/sampler.py.
#include "rows.cuh"
#include "sample.cuh"

struct Seen {
  int id;
  int count;  // 1 for a token of the prompt; one more for each time it was generated
};

// A slot's wishes and what it has seen; edgellm/kernels/adjust.py writes the same layout.
template <int BIASES, int SUPPRESSED, int SEEN>
struct Adjustments {
  float repetition, presence, frequency;
  u32 min_tokens;
  int biases, suppressed, seen;
  u32 counted;  // how many of the slot's tokens `history` has
  int bias_ids[BIASES];
  float bias[BIASES];
  int suppressed_ids[SUPPRESSED];
  Seen history[SEEN];
};

// In place, a block for each row.
template <int VOCAB, int BIASES, int SUPPRESSED, int SEEN>
__global__ void __launch_bounds__(256)
    adjust(const Row* __restrict__ rows, const Sampling* sampling, Adjustments<BIASES, SUPPRESSED, SEEN>* adjustments,
           const int* last_token, float* logits) {
  __shared__ bool found;
  launch_dependents();
  const Row row = rows[blockIdx.x];
  wait_for_previous();
  if (row.slot < 0 || !(row.flags & WANTS_TOKEN) || !(load_l2(&sampling[row.slot].flags) & ADJUSTED)) return;
  const u32 index = load_l2(&sampling[row.slot].index);
  auto& mine = adjustments[row.slot];
  float* const x = logits + u64(blockIdx.x) * VOCAB;

  const float repetition = load_l2(&mine.repetition);
  const float presence = load_l2(&mine.presence), frequency = load_l2(&mine.frequency);
  const bool counts = repetition != 1.f || presence != 0.f || frequency != 0.f;
  int seen = load_l2(&mine.seen);
  if (counts && load_l2(&mine.counted) < index) {
    const int last = load_l2(last_token + row.slot);
    if (threadIdx.x == 0) found = false;
    __syncthreads();
    for (int i = threadIdx.x; i < seen; i += blockDim.x)
      if (load_l2(&mine.history[i].id) == last) {
        mine.history[i].count = load_l2(&mine.history[i].count) + 1;
        found = true;
      }
    __syncthreads();
    const bool appended = !found && seen < SEEN;
    if (threadIdx.x == 0) {
      if (appended) mine.history[seen] = {last, 2};
      mine.counted = index;
      mine.seen = seen + appended;
    }
    seen += appended;
  }

  const int biases = load_l2(&mine.biases);
  for (int i = threadIdx.x; i < biases; i += blockDim.x) {
    float* const at = x + load_l2(mine.bias_ids + i);
    *at = __fadd_rn(load_l2(at), load_l2(mine.bias + i));
  }
  __syncthreads();
  if (index < load_l2(&mine.min_tokens)) {
    const int suppressed = load_l2(&mine.suppressed);
    for (int i = threadIdx.x; i < suppressed; i += blockDim.x)
      x[load_l2(mine.suppressed_ids + i)] = __int_as_float(0xff800000);
  }
  __syncthreads();
  if (!counts) return;
  for (int i = threadIdx.x; i < seen; i += blockDim.x) {
    float* const at = x + load_l2(&mine.history[i].id);
    const int generated = load_l2(&mine.history[i].count) - 1;
    float value = load_l2(at);
    if (repetition != 1.f) value = value > 0.f ? __fdiv_rn(value, repetition) : __fmul_rn(value, repetition);
    value = __fsub_rn(value, __fmul_rn(frequency, float(generated)));
    *at = __fsub_rn(value, generated > 0 ? presence : 0.f);
  }
}
