#include "cache/store/model_store.h"

#include <utility>

#include "cache/store/model_frame.h"

namespace kdfast::cache {
namespace {

template <class Node>
void push(std::atomic<const Node*>& list, Node* node) {
    node->next = list.load(std::memory_order_relaxed);
    while (!list.compare_exchange_weak(node->next, node, std::memory_order_release, std::memory_order_relaxed)) {
    }
}

template <class Node>
void free_all(const Node* node) {
    while (node) delete std::exchange(node, node->next);
}

}  // namespace

ModelStore::ModelStore(std::size_t shards, std::uint32_t vocab_size, std::size_t temperatures)
    : vocab_size_(vocab_size), temperatures_(temperatures), placed_(shards) {}

ModelStore::~ModelStore() {
    for (const auto& list : placed_) free_all(list.load());
    free_all(known_.load());
}

// Two threads that come at once may both make it; one of the two is then never found again, and goes with the store.
const ModelStore::Known& ModelStore::known(std::vector<std::byte> payload) const {
    for (const Known* k = known_.load(std::memory_order_acquire); k; k = k->next)
        if (k->payload == payload) return *k;
    CompactDecoder decoder(parse_model(payload, vocab_size_, temperatures_));
    auto made = std::make_unique<Known>(Known{std::move(payload), std::move(decoder)});
    push(known_, made.get());
    return *made.release();
}

const CompactDecoder& ModelStore::get(std::uint32_t shard, std::uint64_t offset, const File& file,
                                      std::uint64_t shard_id, std::uint64_t end) const {
    std::atomic<const Placed*>& list = placed_[shard];
    for (const Placed* p = list.load(std::memory_order_acquire); p; p = p->next)
        if (p->offset == offset) return p->model->decoder;
    const Known& model = known(read_model(file, shard_id, offset, end));
    push(list, new Placed{offset, &model});
    return model.decoder;
}

}  // namespace kdfast::cache
