#include "index/records.h"

namespace kvc2 {

void Records::append(RadixTree& tree, Place at, uint64_t generation) {
  const Tokens block = tree.tokens(at);
  namespaces.push_back(tree.spaces[tree[at.node].space].name);
  digests.push_back(tree.digest(at));
  parents.push_back(tree.parent_digest(at));
  keys.push_back(tree[at.node].keys[at.offset]);
  tokens.insert(tokens.end(), block.begin(), block.end());
  external_bytes.push_back(0);
  external_keys.push_back({});
  extras.push_back({});
  generations.push_back(generation);
}

}  // namespace kvc2
