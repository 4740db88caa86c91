// kvc2._core, section "block": hashes, digest chains, headers of whole arrays of pages.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "base/sha256.h"
#include "base/xxh3.h"
#include "bindings/arrays.h"
#include "bindings/extras.h"
#include "block/header.h"
#include "index/block_key.h"

namespace py = pybind11;

namespace kvc2::bindings {
namespace {

template <size_t n>
py::bytes to_bytes(const std::array<uint8_t, n>& hash) {
  return {reinterpret_cast<const char*>(hash.data()), hash.size()};
}

Bytes32 bytes32(const py::bytes& object, const char* name) {
  const std::string_view bytes = object;
  Bytes32 copy;
  if (bytes.size() != copy.size()) {
    throw py::value_error(std::string(name) + " has " + std::to_string(bytes.size()) +
                          " bytes, not 32");
  }
  std::memcpy(copy.data(), bytes.data(), copy.size());
  return copy;
}

py::bytes hash_xxh3(const py::object& data) {
  const Exported memory(data, "data", false);
  Bytes16 hash;
  {
    const py::gil_scoped_release released;
    hash = xxh3_128(memory.data(), memory.bytes());
  }
  return to_bytes(hash);
}

py::bytes hash_sha256(const py::object& data) {
  const Exported memory(data, "data", false);
  Bytes32 hash;
  {
    const py::gil_scoped_release released;
    hash = sha256({memory.data(), memory.bytes()});
  }
  return to_bytes(hash);
}

py::array_t<uint8_t> digests_of(const py::bytes& parent, const py::object& tokens, size_t page_size,
                                const GivenExtras& extras) {
  Digest digest = bytes32(parent, "parent");
  const auto words = elements<uint32_t>(tokens, "tokens", {kAnyLength});
  if (page_size == 0) throw py::value_error("page_size is 0; it is at least 1");
  const Content content(words, rows_of(extras));
  const size_t blocks = words.size() / page_size;
  py::array_t<uint8_t> digests({blocks, sizeof(Digest)});
  uint8_t* out = digests.mutable_data();
  const py::gil_scoped_release released;
  for (size_t i = 0; i < blocks; ++i, out += sizeof digest) {
    digest = next_digest(digest, content.block(i, page_size));
    std::memcpy(out, digest.data(), sizeof digest);
  }
  return digests;
}

// The attributes of Records (bound with the index; any object that has them will do).
struct RecordArrays {
  explicit RecordArrays(const py::object& records) {
    generations_object = records.attr("generations");
    generations = elements<uint64_t>(generations_object, "records.generations", {kAnyLength});
    const auto n = static_cast<py::ssize_t>(generations.size());
    namespaces = take<uint8_t>(records, "namespaces", {n, 32}, namespaces_object);
    digests = take<uint8_t>(records, "digests", {n, 32}, digests_object);
    parents = take<uint8_t>(records, "parents", {n, 32}, parents_object);
    keys = take<uint8_t>(records, "keys", {n, 16}, keys_object);
    tokens = take<uint32_t>(records, "tokens", {n, kAnyLength}, tokens_object);
    external_bytes = take<uint8_t>(records, "external_bytes", {n}, external_bytes_object);
    external_keys =
        take<uint8_t>(records, "external_keys", {n, kExternalKeyMax}, external_keys_object);
    extras = take<uint8_t>(records, "extras", {n, 32}, extras_object);
    if (std::ranges::any_of(external_bytes, [](uint8_t each) { return each > kExternalKeyMax; })) {
      throw py::value_error("records.external_bytes: more than 64 in a key");
    }
    page_size = static_cast<size_t>(py::array(tokens_object).shape(1));
    if (page_size < 1 || page_size > kTokensMax) {
      throw py::value_error("records.tokens has " + std::to_string(page_size) +
                            " tokens a block; a header holds 1 to 512");
    }
  }

  BlockRecord operator[](size_t i) const {
    return {namespaces.data() + i * 32,
            digests.data() + i * 32,
            parents.data() + i * 32,
            keys.data() + i * 16,
            tokens.subspan(i * page_size, page_size),
            generations[i],
            external_keys.subspan(i * kExternalKeyMax, external_bytes[i]),
            extras.data() + i * 32};
  }

  std::span<const uint8_t> namespaces, digests, parents, keys, external_bytes, external_keys,
      extras;
  std::span<const uint32_t> tokens;
  std::span<const uint64_t> generations;
  size_t page_size;

 private:
  template <class T>
  static std::span<const T> take(const py::object& records, const std::string& field,
                                 const std::vector<py::ssize_t>& shape, py::object& keep) {
    keep = records.attr(field.c_str());
    return elements<T>(keep, ("records." + field).c_str(), shape);
  }

  // own the arrays: an attribute may be made anew at each access
  py::object namespaces_object, digests_object, parents_object, keys_object, tokens_object,
      generations_object, external_bytes_object, external_keys_object, extras_object;
};

// Pages [offsets[i], offsets[i] + header + payload) of the memory, each inside it.
std::span<const uint64_t> page_offsets(const py::object& object, size_t blocks, size_t memory_bytes,
                                       uint64_t payload_bytes) {
  const auto offsets = elements<uint64_t>(object, "offsets", {static_cast<py::ssize_t>(blocks)});
  for (size_t i = 0; i < offsets.size(); ++i) {
    const std::string name = "offsets[" + std::to_string(i) + "] = " + std::to_string(offsets[i]);
    if (offsets[i] % kHeaderBytes != 0) {
      throw py::value_error(name + " is not a multiple of 4096");
    }
    const bool header_inside =
        offsets[i] <= memory_bytes && memory_bytes - offsets[i] >= kHeaderBytes;
    if (!header_inside || memory_bytes - offsets[i] - kHeaderBytes < payload_bytes) {
      throw py::index_error(name + ": a page of 4096 + " + std::to_string(payload_bytes) +
                            " bytes ends outside memory of " + std::to_string(memory_bytes));
    }
  }
  return offsets;
}

py::array_t<uint8_t> encode(const py::object& memory, const py::object& offsets,
                            const py::object& records, const py::bytes& layout_digest,
                            uint64_t payload_bytes) {
  const Exported pages(memory, "memory", true);
  const RecordArrays blocks(records);
  const size_t n = blocks.generations.size();
  const auto at = page_offsets(offsets, n, pages.bytes(), payload_bytes);
  const PayloadShape payload{bytes32(layout_digest, "layout_digest"), payload_bytes};
  py::array_t<uint8_t> checksums({n, sizeof(Bytes16)});
  uint8_t* const out = checksums.mutable_data();
  const py::gil_scoped_release released;
  for (size_t i = 0; i < n; ++i) {
    const Bytes16 checksum = encode_header(pages.data() + at[i], blocks[i], payload);
    std::memcpy(out + i * sizeof checksum, checksum.data(), sizeof checksum);
  }
  return checksums;
}

py::array_t<uint8_t> verify(const py::object& memory, const py::object& offsets,
                            const py::object& records, const py::bytes& layout_digest,
                            uint64_t payload_bytes) {
  const Exported pages(memory, "memory", false);
  const RecordArrays blocks(records);
  const size_t n = blocks.generations.size();
  const auto at = page_offsets(offsets, n, pages.bytes(), payload_bytes);
  const PayloadShape payload{bytes32(layout_digest, "layout_digest"), payload_bytes};
  py::array_t<uint8_t> states(static_cast<py::ssize_t>(n));
  uint8_t* const out = states.mutable_data();
  const py::gil_scoped_release released;
  for (size_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint8_t>(verify_block(pages.data() + at[i], blocks[i], payload));
  }
  return states;
}

// What header sectors say, one after the other in memory.
struct HeaderArrays {
  py::array_t<uint8_t> sound, namespaces, digests, parents, checksums;
  py::array_t<uint32_t> tokens;
  py::array_t<uint8_t> external_bytes, external_keys, extras;
};

HeaderArrays read_headers(const py::object& memory, const py::object& generations,
                          const py::bytes& layout_digest, uint64_t payload_bytes,
                          size_t page_size) {
  const Exported sectors(memory, "memory", false);
  const auto wanted = elements<uint64_t>(generations, "generations", {kAnyLength});
  const size_t n = wanted.size();
  if (page_size < 1 || page_size > kTokensMax) {
    throw py::value_error("page_size is " + std::to_string(page_size) + ", not 1 to 512");
  }
  if (sectors.bytes() / kHeaderBytes < n) {
    throw py::value_error("memory has room for fewer than " + std::to_string(n) + " headers");
  }
  const PayloadShape payload{bytes32(layout_digest, "layout_digest"), payload_bytes};
  const auto bytes = [n](size_t width) { return py::array_t<uint8_t>({n, width}); };
  HeaderArrays found{py::array_t<uint8_t>(static_cast<py::ssize_t>(n)),
                     bytes(32),
                     bytes(32),
                     bytes(32),
                     bytes(16),
                     py::array_t<uint32_t>({n, page_size}),
                     py::array_t<uint8_t>(static_cast<py::ssize_t>(n)),
                     bytes(kExternalKeyMax),
                     bytes(32)};
  uint8_t* const sound = found.sound.mutable_data();
  uint8_t* const namespaces = found.namespaces.mutable_data();
  uint8_t* const digests = found.digests.mutable_data();
  uint8_t* const parents = found.parents.mutable_data();
  uint8_t* const checksums = found.checksums.mutable_data();
  uint32_t* const tokens = found.tokens.mutable_data();
  uint8_t* const external_bytes = found.external_bytes.mutable_data();
  uint8_t* const external_keys = found.external_keys.mutable_data();
  uint8_t* const extras = found.extras.mutable_data();
  const py::gil_scoped_release released;
  for (size_t i = 0; i < n; ++i) {
    const HeaderFields into{namespaces + i * 32,
                            digests + i * 32,
                            parents + i * 32,
                            checksums + i * 16,
                            {tokens + i * page_size, page_size},
                            external_bytes + i,
                            external_keys + i * kExternalKeyMax,
                            extras + i * 32};
    sound[i] = read_header(sectors.data() + i * kHeaderBytes, payload, wanted[i], into);
  }
  return found;
}

}  // namespace
}  // namespace kvc2::bindings

void bind_block(py::module_& module) {
  using namespace kvc2;
  using namespace kvc2::bindings;
  module.attr("HEADER_BYTES") = kHeaderBytes;
  module.attr("PAYLOAD_CHECKSUM_OFFSET") = kPayloadChecksumOffset;
  module.attr("BLOCK_OK") = static_cast<int>(BlockState::kOk);
  module.attr("BLOCK_BAD_HEADER") = static_cast<int>(BlockState::kBadHeader);
  module.attr("BLOCK_OTHER") = static_cast<int>(BlockState::kOther);
  module.attr("BLOCK_STALE") = static_cast<int>(BlockState::kStale);
  module.attr("BLOCK_BAD_PAYLOAD") = static_cast<int>(BlockState::kBadPayload);
  module.def("xxh3_128", &hash_xxh3, py::arg("data"));
  module.def("sha256", &hash_sha256, py::arg("data"));
  module.def("chain_digests", &digests_of, py::arg("parent"), py::arg("tokens"),
             py::arg("page_size"), py::arg("extras") = py::none());
  module.def("encode_headers", &encode, py::arg("memory"), py::arg("offsets"), py::arg("records"),
             py::arg("layout_digest"), py::arg("payload_bytes"));
  py::class_<HeaderArrays>(module, "Headers")
      .def_readonly("sound", &HeaderArrays::sound)
      .def_readonly("namespaces", &HeaderArrays::namespaces)
      .def_readonly("digests", &HeaderArrays::digests)
      .def_readonly("parents", &HeaderArrays::parents)
      .def_readonly("checksums", &HeaderArrays::checksums)
      .def_readonly("tokens", &HeaderArrays::tokens)
      .def_readonly("external_bytes", &HeaderArrays::external_bytes)
      .def_readonly("external_keys", &HeaderArrays::external_keys)
      .def_readonly("extras", &HeaderArrays::extras);
  module.def("read_headers", &read_headers, py::arg("memory"), py::arg("generations"),
             py::arg("layout_digest"), py::arg("payload_bytes"), py::arg("page_size"));
  module.def("verify_blocks", &verify, py::arg("memory"), py::arg("offsets"), py::arg("records"),
             py::arg("layout_digest"), py::arg("payload_bytes"));
}
