// The shards that a reader has open: a few of them, however many there are.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cache/store/file.h"

namespace kdfast::cache {

// Keeps up to `most` files open; the one used longest ago is closed for the next, but none that somebody reads. Without
// a lock: a process forked from one whose other threads were at work would wait for theirs for ever. There it may have
// a few places less, as the files that those threads were reading stay in use.
class OpenFiles {
    struct Slot {
        std::atomic<std::uint64_t> state{0};  // number of the file + 1, 0 for none, then how many use it
        std::atomic<std::uint64_t> used{0};   // when, by the clock
        File file;
    };

  public:
    explicit OpenFiles(std::size_t most) : slots_(most) {}
    OpenFiles(const OpenFiles&) = delete;
    OpenFiles& operator=(const OpenFiles&) = delete;

    std::size_t most() const { return slots_.size(); }

    // A file that stays open as long as this lives.
    class Handle {
      public:
        explicit Handle(Slot& slot) : slot_(&slot) {}
        explicit Handle(File own) : own_(std::move(own)) {}
        Handle(Handle&& other) noexcept : slot_(std::exchange(other.slot_, nullptr)), own_(std::move(other.own_)) {}
        Handle& operator=(Handle&&) = delete;
        ~Handle() {
            if (slot_) slot_->state.fetch_sub(1, std::memory_order_release);
        }
        const File& operator*() const { return slot_ ? slot_->file : own_; }

      private:
        Slot* slot_ = nullptr;
        File own_;
    };

    // File number `number`, which open() opens where it is not. Where all places are in use it is closed with the
    // handle. Two threads that come at once may open a file twice.
    template <class Open>
    Handle get(std::uint32_t number, Open open) const {
        const std::uint64_t wanted = (std::uint64_t{number} + 1) << 32;
        for (Slot& slot : slots_) {
            std::uint64_t state = slot.state.load(std::memory_order_relaxed);
            while (state >> 32 == wanted >> 32)
                if (slot.state.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
                    slot.used.store(++clock_, std::memory_order_relaxed);
                    return Handle(slot);
                }
        }
        Slot* const slot = take();
        if (!slot) return Handle(open());
        Handle handle(*slot);
        slot->file = File();
        slot->file = open();
        slot->state.fetch_add(wanted, std::memory_order_release);  // still in use, here
        return handle;
    }

  private:
    // The free place used longest ago, now without a number and in use; null where there is none.
    Slot* take() const {
        for (;;) {
            Slot* oldest = nullptr;
            std::uint64_t state = 0, when = ~std::uint64_t{0};
            for (Slot& slot : slots_) {
                const std::uint64_t now = slot.state.load(std::memory_order_acquire);
                const std::uint64_t used = slot.used.load(std::memory_order_relaxed);
                if ((now & 0xFFFFFFFF) != 0 || used >= when) continue;
                oldest = &slot;
                state = now;
                when = used;
            }
            if (!oldest) return nullptr;
            if (oldest->state.compare_exchange_strong(state, 1, std::memory_order_acquire)) {
                oldest->used.store(++clock_, std::memory_order_relaxed);
                return oldest;
            }
        }
    }

    mutable std::vector<Slot> slots_;
    mutable std::atomic<std::uint64_t> clock_ = 0;
};

}  // namespace kdfast::cache
