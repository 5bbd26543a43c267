// Model frames: where a shard keeps the models of its compact frames, each twice (FORMAT.md, section 6.4).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "cache/format.h"
#include "cache/store/file.h"

namespace kdfast::cache {

struct ModelHeader {
    static constexpr std::size_t size = 56;
    std::uint32_t payload_bytes = 0;
    std::uint32_t payload_crc = 0;
    std::uint64_t offset = 0;
    std::uint64_t shard_id = 0;
    std::uint64_t first_copy = 0;  // its offset: this one's own, or that of the one right before it

    std::uint64_t frame_bytes() const { return align8(size + payload_bytes); }
    IndexEntry entry() const;
    std::array<std::byte, size> bytes() const;
    static ModelHeader parse(Bytes bytes);
};

// Whether a frame that begins with these bytes is one of a model.
bool is_model_frame(Bytes bytes);

// The header of the model frame at `offset`, which ends at `end` or before.
ModelHeader read_model_header(const File& shard, std::uint64_t shard_id, std::uint64_t offset, std::uint64_t end);

// The payload of one copy, verified.
std::vector<std::byte> read_model_copy(const File& shard, const ModelHeader& header);

// The payload of the model whose first copy is at `offset`: out of the second where the first is damaged. Both end at
// `end` or before.
std::vector<std::byte> read_model(const File& shard, std::uint64_t shard_id, std::uint64_t offset, std::uint64_t end);

}  // namespace kdfast::cache
