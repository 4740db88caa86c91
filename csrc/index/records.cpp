#include "index/records.h"

namespace kvc2 {

void Records::append(RadixTree& tree, Place at, uint64_t generation) {
  const Block named = tree.block(at);
  const Tokens block = named.tokens;
  const Space& space = tree.spaces[tree[at.node].space];
  namespaces.push_back(space.name);
  digests.push_back(tree.digest(at));
  parents.push_back(tree.parent_digest(at));
  keys.push_back(tree[at.node].keys[at.offset]);
  external_bytes.push_back(space.opaque ? static_cast<uint8_t>(block[0]) : 0);
  external_keys.push_back({});
  if (space.opaque) {
    std::memcpy(external_keys.back().data(), &block[1], sizeof(ExternalKey));
    tokens.insert(tokens.end(), space.page_size, 0);
  } else {
    tokens.insert(tokens.end(), block.begin(), block.end());
  }
  extras.push_back(named.extras ? *named.extras : Digest{});
  generations.push_back(generation);
}

}  // namespace kvc2
