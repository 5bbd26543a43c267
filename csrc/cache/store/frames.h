// The frames of a shard: the header of one, and all of them where there is no index.
#pragma once

#include <cstdint>
#include <vector>

#include "cache/fault.h"
#include "cache/format.h"
#include "cache/store/file.h"
#include "cache/store/journal.h"

namespace kdfast::cache {

// The header of the frame that lies where an entry says, in as many bytes as it says; the rest of it is not compared.
FrameHeader read_frame_header(const File& shard, const IndexEntry& entry, std::uint64_t shard_id);

// Frames in [first, end) of a shard, models among them, each as long as its header says. Behind one that is damaged,
// the next one that is not, if `damage` is given; otherwise that is thrown.
Index scan_frames(const File& shard, std::uint64_t shard_id, std::uint64_t first, std::uint64_t end,
                  std::vector<Fault>* damage);

// Throws Fault mismatch where what the journal says of a shard, whose frames begin at `first`, is not what its index
// does.
void check_commits(const Index& index, const JournalShard& shard, std::uint64_t first);

}  // namespace kdfast::cache
