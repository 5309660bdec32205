// Who wrote and who read each piece of a block's shared memory last, and whether a barrier lies between two accesses.
//
// Time is counted in barriers: `epoch` of the whole block, `warp` of __syncwarp, `named` of a named barrier. Of two
// accesses by different threads, one a write, the first comes before the second if both threads have passed a
// barrier in between: one of the block, one of their warp, or the same named one. Shuffles order no memory.
#pragma once

#include <cstdint>
#include <cstring>

namespace machine {

struct Moment {
  std::uint32_t epoch, warp, named;  // named: the barrier's name · 2^24 + how often
};

constexpr std::uint16_t SEVERAL = 0x8000, EVERYWHERE = 0xffff;  // SEVERAL + w: threads of warp w

// Of one thread, or of several.
struct Access {
  Moment when;
  std::uint16_t thread;
  std::uint8_t bytes;  // of the unit, a bit each; 0: there was none

  bool is_of(int other) const { return thread == other; }
  int warp() const { return thread & SEVERAL ? thread & 0xff : thread / 32; }

  // Whether it is known to have come before what `other` does now; `team`: the named barrier at which whose access
  // this is arrived last, 0 for none.
  bool before(int other, const Moment& now, std::uint32_t team) const {
    if (when.epoch < now.epoch || thread == other) return true;
    if (thread == EVERYWHERE) return when.named && when.named >> 24 == now.named >> 24 && when.named < now.named;
    if (warp() == other / 32 && when.warp < now.warp) return true;
    const std::uint32_t then = when.named >> 24 == team ? when.named : team << 24;
    return team && now.named >> 24 == team && then < now.named;
  }
};

// Two bytes: what threads share with neighbours is seldom smaller.
constexpr int UNIT = 2;

struct Unit {
  Access write, read;
  bool atomic, on_its_way;  // of `write`; a cp.async that nobody has waited for
  std::uint8_t agreed;      // bytes that several threads wrote, which is fine if all wrote this:
  std::uint16_t value;

  // `team`: of whose read is noted already. One that came before this one can be forgotten: what comes after this one
  // comes after both.
  void note_read(int thread, const Moment& now, std::uint8_t bytes, std::uint32_t team) {
    if (!read.bytes || read.before(thread, now, team)) {
      if (read.thread == thread) bytes |= read.bytes;
      read = {now, std::uint16_t(thread), bytes};
      return;
    }
    const bool same = read.thread != EVERYWHERE && read.warp() == thread / 32;
    read.thread = same ? std::uint16_t(SEVERAL | thread / 32) : EVERYWHERE;
    // Of several warps: the barrier at which they all have met before; 0 if there is none.
    if (!same && read.when.named >> 24 != now.named >> 24) read.when.named = 0;
    else if (read.when.named < now.named) read.when.named = now.named;
    if (read.when.warp < now.warp) read.when.warp = now.warp;
    read.bytes |= bytes;
  }

  void note_write(int thread, const Moment& now, std::uint8_t bytes, bool is_atomic, bool pending) {
    const bool goes_on = write.bytes && write.thread == thread && write.when.epoch == now.epoch &&
                         write.when.warp == now.warp && write.when.named == now.named && on_its_way == pending;
    write = {now, std::uint16_t(thread), std::uint8_t(goes_on ? write.bytes | bytes : bytes)};
    atomic = is_atomic, on_its_way = pending;
  }
};

}  // namespace machine
