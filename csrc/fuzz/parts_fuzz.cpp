// libFuzzer over everything that reads bytes: the parts of a cache's files and the codecs. The first byte chooses the
// part; a fault is an answer, anything else that happens is a bug.
//
//     cmake --preset fuzz && cmake --build --preset fuzz && build/fuzz/kdfast_fuzz -max_total_time=600 csrc/fuzz/corpus
//
// Without libFuzzer (KDFAST_FUZZ_REPLAY) main() runs every file of the directories it is given.
#include <array>
#include <cstdint>
#include <vector>

#include "cache/codec.h"
#include "cache/compact/compact.h"
#include "cache/fault.h"
#include "cache/format.h"
#include "cache/index/parts.h"
#include "cache/store/journal.h"
#include "cache/store/model_frame.h"
#include "core/error.h"

#if defined(KDFAST_FUZZ_REPLAY)
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#endif

using namespace kdfast;
using namespace kdfast::cache;

namespace {

// A layout from six bytes, and then a block, with a model for a compact one. What decodes must be within the bounds
// that the format gives.
void fuzz_block(Bytes bytes, const Model* model = nullptr) {
    if (bytes.size() < 6) return;
    const auto byte = [&](std::size_t i) { return std::to_integer<std::uint32_t>(bytes[i]); };
    Layout layout;
    const bool drawn = byte(0) & 1 && !model;
    layout.codec = drawn ? Codec::drawn : model ? Codec::compact : Codec::fixed;
    layout.method = drawn ? (byte(0) & 2 ? Method::pps : Method::sample) : (byte(0) & 2 ? Method::topp : Method::topk);
    layout.ragged = byte(0) & 4;
    layout.gold = byte(0) & 8;
    layout.vocab_size = model ? model->vocab_size : 1u << (byte(1) % 25);
    layout.kept = 1 + byte(2);
    layout.grid = 2 + byte(3) % 9;
    layout.draws = layout.method == Method::sample ? 1 + byte(4) : 0;
    if (!drawn && byte(0) & 16) layout.temperatures = {2};
    const std::int64_t tokens = 1 + byte(5);
    const Bytes content = bytes.subspan(6);
    std::vector<std::byte> padded(content.begin(), content.end());
    padded.resize(padded.size() + padding_after_block);

    const auto n = static_cast<std::size_t>(tokens), entries = n * layout.kept;
    std::vector<std::int32_t> ids(entries), k_eff(n);
    std::vector<float> values(entries), lse(n), gold(n), neg_entropy(n);
    const Destination out = {.tokens = tokens,
                             .ids = ids.data(),
                             .logprobs = drawn ? nullptr : values.data(),
                             .mass = drawn ? values.data() : nullptr,
                             .lse = lse.data(),
                             .lse_stride = tokens,
                             .k_eff = k_eff.data(),
                             .gold = gold.data(),
                             .neg_entropy = neg_entropy.data()};
    const Bytes block = Bytes(padded).first(content.size());
    const DecodeRequest request{block, tokens, 0, out};
    if (model)
        CompactDecoder(*model).decode(layout, {&request, 1});
    else
        decode(layout, request);
    for (std::size_t i = 0; i < n; ++i) {
        if (k_eff[i] < 0 || static_cast<std::uint32_t>(k_eff[i]) > layout.kept) __builtin_trap();
        for (std::int32_t j = 0; j < k_eff[i]; ++j)
            if (static_cast<std::uint32_t>(ids[i * layout.kept + static_cast<std::size_t>(j)]) >= layout.vocab_size)
                __builtin_trap();
    }
}

// Two lengths, of a vocabulary and of a model's payload, that payload, and a block.
void fuzz_compact(Bytes bytes) {
    if (bytes.size() < 5) return;
    const auto vocab_size = load<std::uint16_t>(bytes, 0), length = load<std::uint16_t>(bytes, 2);
    const std::size_t temperatures = std::to_integer<unsigned>(bytes[4]) >> 4 & 1;  // as the layout has them
    const Bytes rest = bytes.subspan(5);
    if (length > rest.size()) return;
    const Model model = parse_model(rest.first(length), vocab_size, temperatures);
    if (serialise(model) != std::vector(rest.begin(), rest.begin() + length)) __builtin_trap();
    fuzz_block(rest.subspan(length), &model);
}

// Every row of a page that may be the first of file 1.
void fuzz_page(Bytes bytes) {
    if (bytes.size() != IndexPage::size) return;
    for (std::size_t row = IndexPage::check(bytes, 1, 0); row > 0; --row)
        static_cast<void>(IndexPage::row(bytes, row - 1));
}

constexpr std::array<std::byte, 64> cache_header{};  // of which a journal knows the length and the CRC, 0 here

void fuzz_index_part(std::uint32_t part, Bytes bytes) {
    switch (part % 3) {
        case 0:
            return static_cast<void>(IndexTail::parse(bytes));
        case 1:
            return static_cast<void>(IndexedShard::parse(bytes));
        case 2:
            return fuzz_page(bytes);
    }
}

void fuzz_part(std::uint32_t part, Bytes bytes) {
    if (part >= 240) return fuzz_index_part(part, bytes);  // which came later
    switch (part % 9) {
        case 0:
            return static_cast<void>(CacheHeader::parse(bytes));
        case 1:
            return static_cast<void>(ShardHeader::parse(bytes));
        case 2:
            return static_cast<void>(FrameHeader::parse(bytes));
        case 3:
            return static_cast<void>(Index::parse(bytes, 1, 64, 64 + bytes.size()));
        case 4:
            return static_cast<void>(Journal::parse(bytes, 1, cache_header));
        case 5:
            return static_cast<void>(Tail::parse(bytes));
        case 6:
            return fuzz_block(bytes);
        case 7:
            return static_cast<void>(ModelHeader::parse(bytes));
        case 8:
            return fuzz_compact(bytes);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    if (size == 0) return 0;
    try {
        fuzz_part(data[0], std::as_bytes(std::span(data + 1, size - 1)));
    } catch (const Fault&) {
    } catch (const ArgumentError&) {
    }
    return 0;
}

#if defined(KDFAST_FUZZ_REPLAY)
int main(int count, char** folders) {
    int files = 0;
    for (int i = 1; i < count; ++i)
        for (const auto& entry : std::filesystem::directory_iterator(folders[i])) {
            std::ifstream in(entry.path(), std::ios::binary);
            const std::string content(std::istreambuf_iterator<char>(in), {});
            LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(content.data()), content.size());
            ++files;
        }
    std::printf("%d files\n", files);
    return files > 0 ? 0 : 1;
}
#endif
