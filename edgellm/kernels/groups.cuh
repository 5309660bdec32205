// What `route` finds for the linears of experts: rows in groups, each of one expert.
#pragma once

#include "common.cuh"

// Pairs begin … begin + count − 1. In front of all groups lies one whose `expert` is their number.
struct __align__(16) Group {
  int expert, begin, count, unused;
};

DEVICE Group load_group(const Group* at) {
  const int4 g = load_l2((const int4*)at);
  return {g.x, g.y, g.z, g.w};
}
