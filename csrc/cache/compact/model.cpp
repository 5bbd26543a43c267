#include "cache/compact/model.h"

#include <algorithm>
#include <bit>
#include <string>

#include "cache/fault.h"

namespace kdfast::cache {
namespace {

constexpr std::uint32_t layout_of_models = 1;
constexpr unsigned most_raw = 32;

[[noreturn]] void corrupt(const std::string& what) { throw Fault(Code::corrupt, "model: " + what); }

void put_number(std::vector<std::byte>& out, std::uint64_t value) {
    for (; value >= 128; value >>= 7) out.push_back(static_cast<std::byte>(value | 128));
    out.push_back(static_cast<std::byte>(value));
}

class Bytes {
  public:
    explicit Bytes(std::span<const std::byte> bytes) : left_(bytes) {}

    std::uint32_t byte() { return static_cast<std::uint32_t>(take(1)[0]); }
    std::uint64_t number() {
        std::uint64_t value = 0;
        for (unsigned shift = 0; shift < 35; shift += 7) {
            const std::uint32_t b = byte();
            value |= static_cast<std::uint64_t>(b & 127) << shift;
            if (b < 128) {
                if (b == 0 && shift > 0) corrupt("a number in more bytes than it needs");
                return value;
            }
        }
        corrupt("a number of more than 5 bytes");
    }
    std::span<const std::byte> take(std::size_t count) {
        if (count > left_.size()) corrupt("ends before its stated length");
        const auto part = left_.first(count);
        left_ = left_.subspan(count);
        return part;
    }
    std::size_t size() const { return left_.size(); }

  private:
    std::span<const std::byte> left_;
};

void put_alphabet(std::vector<std::byte>& out, const Alphabet& alphabet) {
    put_number(out, alphabet.size());
    std::uint32_t before = 0;
    for (const Symbol& symbol : alphabet) {
        put_number(out, static_cast<std::uint64_t>(symbol.base - before) * 2 + (symbol.raw > 0));
        if (symbol.raw > 0) out.push_back(static_cast<std::byte>(symbol.raw));
        put_number(out, symbol.frequency);
        before = symbol.base;
    }
}

// Values are below `limit`; a base counts in units of 2^unit.
Alphabet take_alphabet(Bytes& bytes, unsigned bits, std::uint64_t limit, unsigned unit = 0,
                       std::uint64_t most_symbols = UINT64_MAX) {
    const std::uint64_t count = bytes.number();
    if (count == 0 || count > std::min(most_symbols, std::uint64_t{1} << bits))
        corrupt("an alphabet of " + std::to_string(count) + " symbols");
    Alphabet alphabet;
    std::uint64_t base = 0, total = 0;
    for (std::uint64_t j = 0; j < count; ++j) {
        const std::uint64_t step = bytes.number();
        base += step >> 1;
        const std::uint32_t raw = step & 1 ? bytes.byte() : 0;
        const std::uint64_t frequency = bytes.number();
        if ((step & 1 && raw == 0) || raw > most_raw || (base << unit) + (std::uint64_t{1} << raw) > limit)
            corrupt("a symbol of values that do not exist");
        total += frequency;
        if (frequency == 0 || total > std::uint64_t{1} << bits) corrupt("frequencies that do not sum to a power of 2");
        alphabet.push_back(
            {static_cast<std::uint32_t>(base), static_cast<std::uint16_t>(frequency), static_cast<std::uint8_t>(raw)});
    }
    if (total != std::uint64_t{1} << bits) corrupt("frequencies that do not sum to a power of 2");
    return alphabet;
}

}  // namespace

unsigned Model::id_bits() const { return vocab_size <= 2 ? 1 : static_cast<unsigned>(std::bit_width(vocab_size - 1)); }

std::vector<std::byte> serialise(const Model& model) {
    std::vector<std::byte> out;
    out.push_back(static_cast<std::byte>(layout_of_models));
    out.push_back(static_cast<std::byte>(model.ids.size()));
    out.push_back(static_cast<std::byte>(model.lse.size()));
    put_number(out, model.vocab_size);
    put_number(out, model.listed.size());
    std::uint64_t word = 0;
    unsigned filled = 0;
    for (const std::uint32_t id : model.listed) {
        word |= static_cast<std::uint64_t>(id) << filled;
        for (filled += model.id_bits(); filled >= 8; filled -= 8, word >>= 8)
            out.push_back(static_cast<std::byte>(word));
    }
    if (filled > 0) out.push_back(static_cast<std::byte>(word));
    for (const Alphabet* one : {&model.classes, &model.kept, &model.top, &model.gold}) put_alphabet(out, *one);
    for (const Alphabet& one : model.lse) put_alphabet(out, one);
    for (const Alphabet& one : model.deltas) put_alphabet(out, one);
    for (const Alphabet& one : model.ids) put_alphabet(out, one);
    return out;
}

Model parse_model(std::span<const std::byte> payload, std::uint32_t vocab_size, std::size_t temperatures) {
    if (payload.size() > most_model_bytes) corrupt(std::to_string(payload.size()) + " bytes");
    Bytes bytes(payload);
    if (const std::uint32_t layout = bytes.byte(); layout != layout_of_models)
        throw Fault(Code::version, "model: layout " + std::to_string(layout));
    const std::uint32_t classes = bytes.byte();
    if (classes == 0 || classes > most_classes) corrupt(std::to_string(classes) + " classes");
    if (const std::uint32_t count = bytes.byte(); count != temperatures)
        throw Fault(Code::mismatch, "model: " + std::to_string(count) + " temperatures other than 1, not " +
                                        std::to_string(temperatures));
    Model model;
    if (const std::uint64_t size = bytes.number(); size != vocab_size)
        throw Fault(Code::mismatch,
                    "model: a vocabulary of " + std::to_string(size) + ", not " + std::to_string(vocab_size));
    model.vocab_size = vocab_size;

    const std::uint64_t listed = bytes.number();
    if (listed > std::min(vocab_size, most_listed)) corrupt(std::to_string(listed) + " ids listed");
    const unsigned bits = model.id_bits();
    const auto packed = bytes.take((listed * bits + 7) / 8);
    std::vector<bool> seen(vocab_size);
    std::uint64_t word = 0;
    unsigned filled = 0;
    std::size_t next = 0;
    model.listed.reserve(listed);
    while (model.listed.size() < listed) {
        for (; filled < bits; filled += 8) word |= static_cast<std::uint64_t>(packed[next++]) << filled;
        const auto id = static_cast<std::uint32_t>(word & ((std::uint64_t{1} << bits) - 1));
        word >>= bits;
        filled -= bits;
        if (id >= vocab_size || seen[id]) corrupt("an id listed that does not exist, or twice");
        seen[id] = true;
        model.listed.push_back(id);
    }
    if (word != 0) corrupt("bits behind the listed ids");

    constexpr std::uint64_t one = 1;
    model.classes = take_alphabet(bytes, precision, classes);
    model.kept = take_alphabet(bytes, precision, one << 16);
    model.top = take_alphabet(bytes, precision, one << 32, float_raw);
    model.gold = take_alphabet(bytes, precision, one << 32, float_raw);
    for (std::size_t j = 0; j < temperatures; ++j)
        model.lse.push_back(take_alphabet(bytes, precision, one << 32, float_raw));
    for (Alphabet& alphabet : model.deltas)
        alphabet = take_alphabet(bytes, precision, one << 24, 0, most_delta_symbols);
    for (std::uint32_t c = 0; c < classes; ++c)
        model.ids.push_back(take_alphabet(bytes, id_precision, listed + (one << bits)));
    if (bytes.size() != 0) corrupt("bytes behind its last alphabet");
    return model;
}

}  // namespace kdfast::cache
