// What a header and the catalogue write of a block: its identity, as arrays by block.
#pragma once

#include <vector>

#include "index/radix_tree.h"

namespace kvc2 {

struct Records {
  std::vector<Digest> namespaces, digests;
  std::vector<Digest> parents;  // digest of the block before; of a first block its namespace
  std::vector<BlockKey> keys;
  std::vector<uint32_t> tokens;            // page_size of each; zeros where a key names the block
  std::vector<uint8_t> external_bytes;     // the key's length; 0: tokens name the block
  std::vector<ExternalKey> external_keys;  // padded with zeros
  std::vector<Digest> extras;              // zeros: none
  std::vector<uint64_t> generations;

  // One more block. The tree makes the digests that are missing on its path.
  void append(RadixTree& tree, Place at, uint64_t generation);
};

struct Residents {  // of a durable pool, in page order
  std::vector<PageId> pages;
  Records records;
};

}  // namespace kvc2
