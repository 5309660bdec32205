// The device's memory: its allocations, and who wrote each piece of them last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace machine {

// A thread of a block of a launch, in terms of the barriers that it had passed: see races.hpp.
struct Writer {
  std::uint32_t launch, block, epoch;
  std::uint16_t warp, thread : 10, bytes : 2, atomic : 1;  // bytes: of the grain, a bit each

  // Whether a thread of the same block, that was there, came after a barrier since.
  bool before(const Writer& other) const {
    return thread == other.thread || epoch < other.epoch ||
           (epoch == other.epoch && thread / 32 == other.thread / 32 && warp < other.warp);
  }
};

// Bytes that have a writer together: the smallest that different blocks write side by side.
constexpr std::size_t GRAIN = 2;

struct Region {
  std::uintptr_t begin, end;
  std::vector<Writer> writers;  // by grains

  bool holds(std::uintptr_t at, std::size_t size) const { return at >= begin && at + size <= end; }
};

// Changes between launches only.
class Memory {
 public:
  std::uint64_t version = 1;  // of the set of allocations

  void add(void* p, std::size_t size) {
    auto region = std::make_unique<Region>();
    region->begin = std::uintptr_t(p), region->end = region->begin + size;
    region->writers.resize((size + GRAIN - 1) / GRAIN);
    regions.insert(above(region->begin), std::move(region));
    version++;
  }

  void remove(void* p) {
    regions.erase(
        std::remove_if(regions.begin(), regions.end(), [&](auto& r) { return r->begin == std::uintptr_t(p); }),
        regions.end());
    version++;
  }

  // The allocation that an address lies in, or at the end of; null: none.
  Region* find(std::uintptr_t at) {
    auto next = above(at);
    if (next == regions.begin()) return nullptr;
    Region* const found = (--next)->get();
    return at <= found->end ? found : nullptr;
  }

 private:
  std::vector<std::unique_ptr<Region>> regions;  // in the order of addresses

  std::vector<std::unique_ptr<Region>>::iterator above(std::uintptr_t at) {
    return std::upper_bound(regions.begin(), regions.end(), at, [](auto a, auto& r) { return a < r->begin; });
  }
};

}  // namespace machine
