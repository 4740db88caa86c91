// kvc2._core, part "index": whole arrays in, whole arrays out, the GIL released in between. The
// contract is kvc2/_core.pyi. Arguments of a wrong dtype are a TypeError and of a wrong shape a
// ValueError, by name; nothing is converted silently.
#include "index/index.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "bindings/arrays.h"
#include "bindings/extras.h"

namespace py = pybind11;
using namespace py::literals;
using namespace kvc2;
using bindings::answers_of;
using bindings::array_of;
using bindings::GivenExtras;
using bindings::unlocked;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// An argument as a C-contiguous array of T with `dims` dimensions, of which the last has `width`
// items (0: any).
template <typename T>
std::span<const T> view(const py::object& given, const char* name, int dims, size_t width = 0) {
  if (!py::isinstance<py::array>(given)) {
    throw py::type_error(std::string(name) + ": not a numpy array");
  }
  const auto array = py::reinterpret_borrow<py::array>(given);
  if (!array.dtype().is(py::dtype::of<T>()) && !array.dtype().equal(py::dtype::of<T>())) {
    throw py::type_error(std::string(name) + ": dtype " +
                         py::str(array.dtype()).cast<std::string>() + ", not " +
                         py::str(py::dtype::of<T>()).cast<std::string>());
  }
  if (array.ndim() != dims || (width != 0 && static_cast<size_t>(array.shape(dims - 1)) != width)) {
    throw py::value_error(std::string(name) + ": shape " +
                          py::str(array.attr("shape")).cast<std::string>() + ", not [n" +
                          (width ? ", " + std::to_string(width) : "") + "]");
  }
  if (!(array.flags() & py::array::c_style)) {
    throw py::value_error(std::string(name) + ": not C-contiguous");
  }
  return {static_cast<const T*>(array.data()), static_cast<size_t>(array.size())};
}

template <typename T>
void same_length(std::span<const T> values, size_t rows, const char* name) {
  if (values.size() != rows) {
    throw py::value_error(std::string(name) + ": " + std::to_string(values.size()) + " rows, not " +
                          std::to_string(rows));
  }
}

std::span<const ExternalKey> external_keys_of(const py::object& given, const char* name) {
  const auto bytes = view<uint8_t>(given, name, 2, sizeof(ExternalKey));
  return {reinterpret_cast<const ExternalKey*>(bytes.data()), bytes.size() / sizeof(ExternalKey)};
}

std::span<const Digest> digests_of(const py::object& given, const char* name) {
  const auto bytes = view<uint8_t>(given, name, 2, sizeof(Digest));
  return {reinterpret_cast<const Digest*>(bytes.data()), bytes.size() / sizeof(Digest)};
}

Content content_of(const py::object& tokens, const GivenExtras& extras, uint64_t first = 0) {
  return {view<uint32_t>(tokens, "tokens", 1), bindings::rows_of(extras), first};
}

// Small fixed-size items (names, extents, answers) as rows of their elements.
template <typename T, typename Item>
Array<T> rows_of(const std::vector<Item>& items) {
  constexpr auto width = static_cast<py::ssize_t>(sizeof(Item) / sizeof(T));
  return Array<T>({static_cast<py::ssize_t>(items.size()), width},
                  reinterpret_cast<const T*>(items.data()));
}

py::tuple tuple_of(const std::vector<uint32_t>& values) { return py::tuple(py::cast(values)); }

Digest namespace_of(const py::bytes& given) {
  const std::string_view bytes = given;
  if (bytes.size() != sizeof(Digest)) {
    throw py::value_error("namespace: " + std::to_string(bytes.size()) + " bytes, not 32");
  }
  Digest name;
  std::memcpy(name.data(), bytes.data(), name.size());
  return name;
}

// The records of a transfer, as arrays; also made by callers who know them from elsewhere.
struct RecordArrays {
  Array<uint8_t> namespaces, digests, parents, keys;
  Array<uint32_t> tokens;
  Array<uint64_t> generations;
  Array<uint8_t> external_bytes, external_keys, extras;
};

RecordArrays arrays_of(const Records& records) {
  const auto count = static_cast<py::ssize_t>(records.digests.size());
  const auto tokens = static_cast<py::ssize_t>(records.tokens.size());
  const py::ssize_t page_size = count ? tokens / count : 0;
  return {rows_of<uint8_t>(records.namespaces),
          rows_of<uint8_t>(records.digests),
          rows_of<uint8_t>(records.parents),
          rows_of<uint8_t>(records.keys),
          Array<uint32_t>({count, page_size}, records.tokens.data()),
          array_of(records.generations),
          array_of(records.external_bytes),
          rows_of<uint8_t>(records.external_keys),
          rows_of<uint8_t>(records.extras)};
}

// [rows, width] of bytes, or [rows] where width is 0: as given, or zeros.
Array<uint8_t> given_or_zeros(const py::object& given, const char* name, size_t rows,
                              size_t width) {
  if (!given.is_none()) {
    same_length(view<uint8_t>(given, name, width ? 2 : 1, width), rows * std::max<size_t>(width, 1),
                name);
    return given;
  }
  std::vector<size_t> shape{rows};
  if (width) shape.push_back(width);
  Array<uint8_t> zeros(shape);
  std::memset(zeros.mutable_data(), 0, static_cast<size_t>(zeros.nbytes()));
  return zeros;
}

py::object object_of(const std::optional<Transfer>& transfer) {
  return transfer ? py::cast(*transfer) : py::none();
}

void bind_results(py::module_& module) {
  py::class_<PagePool::Counts>(module, "PoolCounts")
      .def_readonly("slabs", &PagePool::Counts::slabs)
      .def_readonly("pages", &PagePool::Counts::pages)
      .def_readonly("free", &PagePool::Counts::free)
      .def_readonly("private", &PagePool::Counts::private_)
      .def_readonly("resident", &PagePool::Counts::resident)
      .def_readonly("in_flight", &PagePool::Counts::in_flight)
      .def_readonly("pinned", &PagePool::Counts::pinned)
      .def_readonly("evicted", &PagePool::Counts::evicted)
      .def_readonly("last_copies", &PagePool::Counts::last_copies)
      .def_readonly("refused", &PagePool::Counts::refused);
  py::class_<IndexCounts>(module, "IndexCounts")
      .def_readonly("namespaces", &IndexCounts::namespaces)
      .def_readonly("nodes", &IndexCounts::nodes)
      .def_readonly("blocks", &IndexCounts::blocks)
      .def_readonly("holes", &IndexCounts::holes)
      .def_readonly("leases", &IndexCounts::leases)
      .def_readonly("transfers", &IndexCounts::transfers)
      .def_readonly("metadata_bytes", &IndexCounts::metadata_bytes)
      .def_readonly("collisions", &IndexCounts::collisions)
      .def_readonly("deaths", &IndexCounts::deaths)
      .def_readonly("dead_known", &IndexCounts::dead_known)
      .def_readonly("dead_bytes", &IndexCounts::dead_bytes);
  py::class_<Hints>(module, "Hints")
      .def(py::init([](uint32_t ttl, uint32_t returns_within, uint8_t priority, bool session_end) {
             if (priority > kPriorityMax) throw py::value_error("priority: 0 to 7");
             return Hints{ttl, returns_within, priority, session_end};
           }),
           py::kw_only(), "ttl_s"_a = 0, "expect_return_within_s"_a = 0, "priority"_a = 0,
           "session_end"_a = false);
  py::class_<Match>(module, "Match")
      .def_readonly("blocks", &Match::blocks)
      .def_property_readonly("tiers", [](const Match& m) { return tuple_of(m.tiers); });
  py::class_<Wait>(module, "Wait").def_readonly("transfer", &Wait::transfer);
  py::class_<Evicted>(module, "Evicted")
      .def_property_readonly("pages", [](const Evicted& e) { return array_of(e.pages); })
      .def_property_readonly("digests",
                             [](const Evicted& e) { return rows_of<uint8_t>(e.digests); })
      .def_readonly("last_copies", &Evicted::last_copies);
  py::class_<LeaseView>(module, "Lease")
      .def_readonly("id", &LeaseView::id)
      .def_readonly("matched", &LeaseView::matched)
      .def_readonly("first_block", &LeaseView::first_block)
      .def_property_readonly("pages", [](const LeaseView& l) { return array_of(l.pages); })
      .def_property_readonly("tiers", [](const LeaseView& l) { return tuple_of(l.tiers); })
      .def_readonly("transfer", &LeaseView::transfer)
      .def_readonly("computing", &LeaseView::computing)
      .def_readonly("arrived", &LeaseView::arrived)
      .def_property_readonly("explanation", [](const LeaseView& l) { return l.explanation; })
      .def_property_readonly("ahead",
                             [](const LeaseView& l) { return rows_of<uint32_t>(l.ahead); });
}

void bind_transfer(py::module_& module) {
  py::class_<RecordArrays>(module, "Records")
      .def(py::init([](const py::object& namespaces, const py::object& digests,
                       const py::object& parents, const py::object& keys, const py::object& tokens,
                       const py::object& generations, const py::object& external_bytes,
                       const py::object& external_keys, const py::object& extras) {
             const size_t rows = view<uint64_t>(generations, "generations", 1).size();
             same_length(digests_of(namespaces, "namespaces"), rows, "namespaces");
             same_length(digests_of(digests, "digests"), rows, "digests");
             same_length(digests_of(parents, "parents"), rows, "parents");
             view<uint8_t>(keys, "keys", 2, sizeof(BlockKey));
             view<uint32_t>(tokens, "tokens", 2);
             return RecordArrays{
                 namespaces,
                 digests,
                 parents,
                 keys,
                 tokens,
                 generations,
                 given_or_zeros(external_bytes, "external_bytes", rows, 0),
                 given_or_zeros(external_keys, "external_keys", rows, sizeof(ExternalKey)),
                 given_or_zeros(extras, "extras", rows, sizeof(Digest))};
           }),
           py::kw_only(), "namespaces"_a, "digests"_a, "parents"_a, "keys"_a, "tokens"_a,
           "generations"_a, "external_bytes"_a = py::none(), "external_keys"_a = py::none(),
           "extras"_a = py::none())
      .def_readonly("namespaces", &RecordArrays::namespaces)
      .def_readonly("digests", &RecordArrays::digests)
      .def_readonly("parents", &RecordArrays::parents)
      .def_readonly("keys", &RecordArrays::keys)
      .def_readonly("tokens", &RecordArrays::tokens)
      .def_readonly("generations", &RecordArrays::generations)
      .def_readonly("external_bytes", &RecordArrays::external_bytes)
      .def_readonly("external_keys", &RecordArrays::external_keys)
      .def_readonly("extras", &RecordArrays::extras);
  py::class_<Transfer>(module, "Transfer")
      .def_readonly("id", &Transfer::id)
      .def_readonly("source", &Transfer::source)
      .def_readonly("target", &Transfer::target)
      .def_property_readonly("source_pages",
                             [](const Transfer& t) { return array_of(t.source_pages); })
      .def_property_readonly("target_pages",
                             [](const Transfer& t) { return array_of(t.target_pages); })
      .def_property_readonly("extents",
                             [](const Transfer& t) { return rows_of<uint32_t>(t.extents); })
      .def_property_readonly("records", [](const Transfer& t) -> py::object {
        return t.records ? py::cast(arrays_of(*t.records)) : py::none();
      });
}

void bind_pools(py::class_<Index>& index) {
  index
      .def(
          "add_pool",
          [](Index& self, uint32_t page_size, uint32_t pages_per_slab, std::optional<PoolId> below,
             bool durable, uint8_t tier, uint64_t page_bytes, bool second_access) {
            return unlocked([&] {
              return self.add_pool(
                  {page_size, pages_per_slab, below, durable, tier, page_bytes, second_access});
            });
          },
          py::kw_only(), "page_size"_a, "pages_per_slab"_a, "below"_a, "durable"_a, "tier"_a = 0,
          "page_bytes"_a = 1, "second_access"_a = false)
      .def("add_slab", &Index::add_slab, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def("take_slab", &Index::take_slab, "pool"_a, "slab"_a,
           py::call_guard<py::gil_scoped_release>())
      .def("close_slab", &Index::close_slab, "pool"_a, "slab"_a,
           py::call_guard<py::gil_scoped_release>())
      .def("reopen_slab", &Index::reopen_slab, "pool"_a, "slab"_a,
           py::call_guard<py::gil_scoped_release>())
      .def(
          "slab_pages",
          [](const Index& self, PoolId pool) {
            return array_of(unlocked([&] { return self.slab_pages(pool); }));
          },
          "pool"_a)
      .def(
          "residents",
          [](Index& self, PoolId pool, PageId first, uint32_t count) {
            const auto found = unlocked([&] { return self.residents(pool, first, count); });
            return py::make_tuple(array_of(found.pages), arrays_of(found.records));
          },
          "pool"_a, "first"_a, "count"_a)
      .def("victim_age", &Index::victim_age, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def("pool_counts", &Index::pool_counts, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def("close_pool", &Index::close_pool, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def("remove_pool", &Index::remove_pool, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def(
          "open_namespace",
          [](Index& self, const py::bytes& name, uint32_t page_size, bool opaque) {
            const Digest digest = namespace_of(name);
            return unlocked([&] { return self.open_namespace(digest, page_size, opaque); });
          },
          "namespace"_a, "page_size"_a, py::kw_only(), "opaque"_a = false)
      .def("close_namespace", &Index::close_namespace, "namespace"_a,
           py::call_guard<py::gil_scoped_release>())
      .def("has_pins", &Index::has_pins, "namespace"_a, py::call_guard<py::gil_scoped_release>())
      .def("retire", &Index::retire, "namespace"_a, py::call_guard<py::gil_scoped_release>());
}

void bind_grants(py::class_<Index>& index) {
  index
      .def(
          "grant",
          [](Index& self, PoolId pool, uint32_t pages, std::optional<uint32_t> space) {
            return array_of(unlocked([&] { return self.grant(pool, pages, space); }));
          },
          "pool"_a, "pages"_a, "namespace"_a = py::none())
      .def(
          "grant_for",
          [](Index& self, LeaseId lease, uint32_t first_block, uint32_t blocks) {
            return array_of(unlocked([&] { return self.grant_for(lease, first_block, blocks); }));
          },
          "lease"_a, "first_block"_a, "blocks"_a)
      .def(
          "keep",
          [](Index& self, PoolId pool, const py::object& pages) {
            const auto ids = view<uint32_t>(pages, "pages", 1);
            return unlocked([&] { return self.keep(pool, ids); });
          },
          "pool"_a, "pages"_a)
      .def(
          "give_back",
          [](Index& self, PoolId pool, const py::object& pages) {
            const auto ids = view<uint32_t>(pages, "pages", 1);
            return unlocked([&] { return self.give_back(pool, ids); });
          },
          "pool"_a, "pages"_a);
}

void bind_quotas(py::class_<Index>& index) {
  index
      .def("set_quota", &Index::set_quota, "tenant"_a, "tier"_a, py::kw_only(),
           "max_bytes"_a = ~uint64_t{0}, "max_blocks"_a = ~uint64_t{0},
           py::call_guard<py::gil_scoped_release>())
      .def("set_tenant", &Index::set_tenant, "namespace"_a, "tenant"_a,
           py::call_guard<py::gil_scoped_release>())
      .def("trim", &Index::trim, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def(
          "quota_use",
          [](const Index& self, TenantId tenant, uint8_t tier) {
            const Quota quota = self.quota(tenant, tier);
            return std::pair(quota.bytes, quota.blocks);
          },
          "tenant"_a, "tier"_a);
}

void bind_requests(py::class_<Index>& index) {
  index
      .def(
          "match",
          [](const Index& self, uint32_t space, PoolId pool, const py::object& tokens,
             const GivenExtras& extras) {
            const Content prompt = content_of(tokens, extras);
            return unlocked([&] { return self.match(space, pool, prompt); });
          },
          "namespace"_a, "pool"_a, "tokens"_a, "extras"_a = py::none())
      .def(
          "acquire",
          [](Index& self, uint32_t space, PoolId pool, const py::object& tokens,
             uint32_t max_blocks, const Hints& hints, uint32_t skip_blocks, bool touches,
             const GivenExtras& extras) {
            const Content prompt = content_of(tokens, extras);
            return unlocked([&] {
              return self.acquire(space, pool, prompt, max_blocks, hints, skip_blocks, touches);
            });
          },
          "namespace"_a, "pool"_a, "tokens"_a, "max_blocks"_a, "hints"_a = Hints{}, py::kw_only(),
          "skip_blocks"_a = 0, "touches"_a = true, "extras"_a = py::none())
      .def("next_load", &Index::next_load, "lease"_a, "max_pages"_a,
           py::call_guard<py::gil_scoped_release>())
      .def(
          "prefetch",
          [](Index& self, uint32_t space, PoolId pool, const py::object& tokens, uint32_t max_pages,
             bool touches, const GivenExtras& extras) {
            const Content prefix = content_of(tokens, extras);
            return unlocked([&] { return self.prefetch(space, pool, prefix, max_pages, touches); });
          },
          "namespace"_a, "pool"_a, "tokens"_a, "max_pages"_a, py::kw_only(), "touches"_a,
          "extras"_a = py::none())
      .def("promote", &Index::promote, "lease"_a, "max_pages"_a = ~uint32_t{0},
           py::call_guard<py::gil_scoped_release>())
      .def("lease", &Index::lease, "lease"_a, py::call_guard<py::gil_scoped_release>())
      .def("shorten", &Index::shorten, "lease"_a, "blocks"_a,
           py::call_guard<py::gil_scoped_release>())
      .def(
          "commit",
          [](Index& self, LeaseId lease, uint32_t first_block, const py::object& tokens,
             const py::object& pages, const GivenExtras& extras) {
            const Content blocks = content_of(tokens, extras, first_block);
            const auto ids = view<uint32_t>(pages, "pages", 1);
            return answers_of(unlocked([&] { return self.commit(lease, blocks, ids); }));
          },
          "lease"_a, "first_block"_a, "tokens"_a, "pages"_a, "extras"_a = py::none())
      .def("release", &Index::release, "lease"_a, "hints"_a = Hints{},
           py::call_guard<py::gil_scoped_release>())
      .def(
          "release_all",
          [](Index& self, const py::object& leases) {
            const auto ids = view<uint64_t>(leases, "leases", 1);
            return unlocked([&] { return self.release_all(ids); });
          },
          "leases"_a);
}

Array<uint8_t> restore(Index& self, PoolId pool, const py::object& digests,
                       const py::object& parents, const py::object& tokens, const py::object& pages,
                       const py::object& generations, const py::object& stamps,
                       const std::optional<py::object>& expires, const py::object& external_bytes,
                       const py::object& external_keys, const py::object& extras) {
  const RestoreBatch batch{
      digests_of(digests, "digests"),
      digests_of(parents, "parents"),
      view<uint32_t>(tokens, "tokens", 2, self.page_size(pool)),
      view<uint32_t>(pages, "pages", 1),
      view<uint64_t>(generations, "generations", 1),
      view<uint32_t>(stamps, "stamps", 1),
      expires ? view<uint32_t>(*expires, "expires", 1) : std::span<const uint32_t>{},
      external_bytes.is_none() ? std::span<const uint8_t>{}
                               : view<uint8_t>(external_bytes, "external_bytes", 1),
      external_bytes.is_none() ? std::span<const ExternalKey>{}
                               : external_keys_of(external_keys, "external_keys"),
      extras.is_none() ? std::span<const Digest>{} : digests_of(extras, "extras")};
  const size_t rows = batch.digests.size();
  same_length(batch.parents, rows, "parents");
  if (batch.tokens.size() != rows * self.page_size(pool)) {
    throw py::value_error("tokens: not a row for each of digests");
  }
  same_length(batch.pages, rows, "pages");
  same_length(batch.generations, rows, "generations");
  same_length(batch.stamps, rows, "stamps");
  if (expires) same_length(batch.expires, rows, "expires");
  if (!extras.is_none()) same_length(batch.extras, rows, "extras");
  if (!external_bytes.is_none()) {
    same_length(batch.external_bytes, rows, "external_bytes");
    same_length(batch.external_keys, rows, "external_keys");
    const auto too_long = [](uint8_t each) { return each > kOpaqueKeyMax; };
    if (std::ranges::any_of(batch.external_bytes, too_long)) {
      throw py::value_error("external_bytes: more than 64 in a key");
    }
  }
  return answers_of(unlocked([&] { return self.restore(pool, batch); }));
}

void bind_lives(py::class_<Index>& index) {
  index.def("advance", &Index::advance, "now"_a, py::call_guard<py::gil_scoped_release>())
      .def("reap", &Index::reap, "pool"_a, "pages"_a, py::call_guard<py::gil_scoped_release>())
      .def(
          "pin",
          [](Index& self, uint32_t space, PoolId pool, const py::object& tokens, bool hard,
             uint32_t max_blocks, uint32_t ttl, bool keep_stronger, const GivenExtras& extras) {
            const Content prefix = content_of(tokens, extras);
            const Keeping as{hard, max_blocks, ttl, keep_stronger};
            return unlocked([&] { return self.pin(space, pool, prefix, as); });
          },
          "namespace"_a, "pool"_a, "tokens"_a, py::kw_only(), "hard"_a, "max_blocks"_a,
          "ttl_s"_a = 0, "keep_stronger"_a = false, "extras"_a = py::none())
      .def(
          "unpin",
          [](Index& self, uint32_t space, PoolId pool, const py::object& tokens,
             const GivenExtras& extras) {
            const Content prefix = content_of(tokens, extras);
            return unlocked([&] { return self.unpin(space, pool, prefix); });
          },
          "namespace"_a, "pool"_a, "tokens"_a, "extras"_a = py::none())
      .def("pinned_blocks", &Index::pinned_blocks, "pool"_a, py::kw_only(), "hard"_a,
           "tenant"_a = py::none(), py::call_guard<py::gil_scoped_release>())
      .def(
          "lifetimes",
          [](const Index& self, PoolId pool) {
            return array_of(unlocked([&] { return self.lifetimes(pool); }));
          },
          "pool"_a)
      .def("expire_by", &Index::expire_by, "namespace"_a, "second"_a,
           py::call_guard<py::gil_scoped_release>());
}

void bind_behind(py::class_<Index>& index) {
  index
      .def(
          "plan_demote",
          [](Index& self, PoolId pool, uint32_t max_pages, uint32_t ahead) {
            return object_of(unlocked([&] { return self.plan_demote(pool, max_pages, ahead); }));
          },
          "pool"_a, "max_pages"_a, py::kw_only(), "ahead"_a = 0)
      .def("insist", &Index::insist, "lease"_a, py::call_guard<py::gil_scoped_release>())
      .def("insist_all", &Index::insist_all, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def(
          "regret",
          [](const Index& self, uint8_t tier) {
            const Regret found = unlocked([&] { return self.regret(tier); });
            return py::make_tuple(found.watched, found.regretted);
          },
          "tier"_a)
      .def("undemoted", &Index::undemoted, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def("held_in", &Index::held_in, "lease"_a, "pool"_a,
           py::call_guard<py::gil_scoped_release>())
      .def("not_admitted", &Index::not_admitted, "pool"_a, py::call_guard<py::gil_scoped_release>())
      .def(
          "plan_move",
          [](Index& self, PoolId pool, uint32_t slab, uint32_t max_pages) {
            return object_of(unlocked([&] { return self.plan_move(pool, slab, max_pages); }));
          },
          "pool"_a, "slab"_a, "max_pages"_a)
      .def(
          "complete",
          [](Index& self, TransferId transfer, uint32_t done) {
            return array_of(unlocked([&] { return self.complete(transfer, done); }));
          },
          "transfer"_a, "done"_a)
      .def("evict", &Index::evict, "pool"_a, "pages"_a, py::call_guard<py::gil_scoped_release>())
      .def("keep_free", &Index::keep_free, "pool"_a, "pages"_a,
           py::call_guard<py::gil_scoped_release>())
      .def(
          "lost",
          [](Index& self, PoolId pool, const py::object& pages) {
            const auto ids = view<uint32_t>(pages, "pages", 1);
            return unlocked([&] { return self.lost(pool, ids); });
          },
          "pool"_a, "pages"_a)
      .def("restore", &restore, "pool"_a, "digests"_a, "parents"_a, "tokens"_a, "pages"_a,
           "generations"_a, "stamps"_a, "expires"_a = py::none(), py::kw_only(),
           "external_bytes"_a = py::none(), "external_keys"_a = py::none(), "extras"_a = py::none())
      .def(
          "stamps",
          [](const Index& self, PoolId pool) {
            return array_of(unlocked([&] { return self.stamps(pool); }));
          },
          "pool"_a)
      .def(
          "hit_rates",
          [](Index& self, const py::object& capacities) {
            const auto given = view<uint64_t>(capacities, "capacities", 1);
            return array_of(unlocked([&] { return self.hit_rates(given); }));
          },
          "capacities"_a)
      .def("counts", &Index::counts, py::call_guard<py::gil_scoped_release>())
      .def("check", &Index::check, py::call_guard<py::gil_scoped_release>());
}

template <typename Answer>
int number(Answer answer) {
  return static_cast<int>(answer);
}

}  // namespace

void bind_reuse_curve(py::module_& module);                          // reuse_curve.cpp
void bind_extras(py::module_& module);                               // extras.cpp
void bind_explain(py::module_& module, py::class_<Index>& index);    // explain.cpp
void bind_keys(py::module_& module, py::class_<Index>& index);       // keys.cpp
void bind_kv_events(py::module_& module, py::class_<Index>& index);  // kv_events.cpp

void bind_index(py::module_& module) {
  bind_reuse_curve(module);
  py::register_exception_translator([](std::exception_ptr raised) {
    try {
      if (raised) std::rethrow_exception(raised);
    } catch (const UnknownId& unknown) {
      PyErr_SetString(PyExc_KeyError, unknown.what());
    }
  });
  module.attr("ADOPTED") = number(CommitResult::kAdopted);
  module.attr("DUPLICATE") = number(CommitResult::kDuplicate);
  module.attr("REFUSED") = number(CommitResult::kRefused);
  module.attr("DURABLE_MARGIN") = kDurableMargin;
  module.attr("RESTORED") = number(RestoreResult::kRestored);
  module.attr("ORPHAN") = number(RestoreResult::kOrphan);
  module.attr("FORGED") = number(RestoreResult::kForged);
  module.attr("CONFLICT") = number(RestoreResult::kConflict);
  bind_results(module);
  bind_transfer(module);
  bind_extras(module);
  py::class_<Index> index(module, "Index");
  index.def(py::init<uint64_t, uint32_t, std::string_view, uint64_t, uint32_t, bool, size_t>(),
            py::kw_only(), "first_generation"_a = 1, "first_stamp"_a = 1, "policy"_a = "lru",
            "seed"_a = 0, "dead_blocks"_a = 1 << 16, "admission"_a = false, "kv_event_bytes"_a = 0);
  bind_pools(index);
  bind_grants(index);
  bind_quotas(index);
  bind_requests(index);
  bind_lives(index);
  bind_behind(index);
  bind_explain(module, index);
  bind_keys(module, index);
  bind_kv_events(module, index);
  module.def(
      "chain_keys",
      [](const py::bytes& space, const py::object& tokens, uint32_t page_size,
         const GivenExtras& extras) {
        const Digest name = namespace_of(space);
        const Content prompt = content_of(tokens, extras);
        if (page_size == 0 || page_size > kMaxPageSize)
          throw py::value_error("page_size: 1 to 512");
        return rows_of<uint8_t>(
            unlocked([&] { return chain_keys(root_key(name), prompt, page_size); }));
      },
      "namespace"_a, "tokens"_a, "page_size"_a, "extras"_a = py::none());
}
