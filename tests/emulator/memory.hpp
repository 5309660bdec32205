// The device's memory: its allocations, and which launch wrote each word last.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace machine {

struct Region {
  std::uintptr_t begin, end;
  std::vector<std::uint32_t> written;  // by words of 4 bytes: numbers of launches

  bool holds(std::uintptr_t at, std::size_t size) const { return at >= begin && at + size <= end; }
};

// Changes between launches only.
class Memory {
 public:
  std::uint64_t version = 1;  // of the set of allocations

  void add(void* p, std::size_t size) {
    auto region = std::make_unique<Region>();
    region->begin = std::uintptr_t(p), region->end = region->begin + size;
    region->written.resize((size + 3) / 4);
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
