// SPDX-License-Identifier: MIT
#pragma once
/// @file  paged_pool: saved to bytes with its tables, and read back.
///
/// Layout     for each table: tokens, page count (8 bytes each), then its pages (4 bytes each, filled up to 8); the pages in use, by number.

#include <fovea/cache/paged_pool.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline std::vector<std::byte> paged_pool::save(std::span<const page_table* const> tables) const {
  check_all(tables);
  std::size_t head = 0;
  for (const page_table* t : tables) head += 16 + round_up(t->pages.size() * sizeof(std::int32_t), 8);
  const kv_shape& s = shape();
  const std::int64_t fields[7] = {
      s.heads, s.d, s.e, detail::saved_flags(s), page(), pages(), static_cast<isize>(tables.size())};
  const std::size_t used = static_cast<std::size_t>(pages() - free_pages());
  return detail::seal(magic, version, detail::saved_type(s), 0, fields, head + used * layout_.bytes(),
                      [&](std::byte* to) {
                        for (const page_table* t : tables) {
                          const std::int64_t counts[2] = {t->tokens, static_cast<std::int64_t>(t->pages.size())};
                          std::memcpy(to, counts, sizeof counts);
                          const std::size_t bytes = t->pages.size() * sizeof(std::int32_t);
                          if (bytes > 0) std::memcpy(to + sizeof counts, t->pages.data(), bytes);
                          to += sizeof counts + round_up(bytes, 8);
                        }
                        for (isize x = 0; x < pages(); ++x) {
                          if (references(x) == 0) continue;
                          std::memcpy(to, block(static_cast<std::int32_t>(x)), layout_.bytes());
                          to += layout_.bytes();
                        }
                      });
}

inline paged_pool::restored paged_pool::restore(std::span<const std::byte> bytes) {
  const auto s = detail::unseal<7>("paged pool", magic, version, bytes);
  restored r{paged_pool(detail::saved_shape("paged pool", s), s.fields[4], s.fields[5]), {}};
  paged_pool& pool = r.pool;
  std::span<const std::byte> rest = s.payload;
  const auto next = [&](void* to, std::size_t count, std::size_t step) {
    require(step <= rest.size(), "the saved paged pool ends in the middle of a table or page");
    if (count > 0) std::memcpy(to, rest.data(), count);
    rest = rest.subspan(step);
  };
  for (isize x = 0; x < s.fields[6]; ++x) {
    std::int64_t counts[2];
    next(counts, sizeof counts, sizeof counts);
    require(counts[1] >= 0 && counts[1] <= static_cast<std::int64_t>(rest.size() / 4) && counts[0] >= 0 &&
                ceil_div(counts[0], pool.page()) == counts[1],
            "the saved paged pool's table ", x, " has ", counts[1], " pages for ", counts[0], " tokens");
    page_table t;
    t.tokens = counts[0];
    t.pages.resize(static_cast<std::size_t>(counts[1]));
    const std::size_t size = t.pages.size() * sizeof(std::int32_t);
    next(t.pages.data(), size, round_up(size, 8));
    for (const std::int32_t p : t.pages) {
      require(p >= 0 && p < pool.pages(), "the saved paged pool's table ", x, " names page ", p, " of ", pool.pages());
      ++pool.references_[static_cast<std::size_t>(p)];
    }
    r.tables.push_back(std::move(t));
  }
  pool.free_.clear();
  for (isize x = pool.pages(); x-- > 0;)
    if (pool.references(x) == 0) pool.free_.push_back(static_cast<std::int32_t>(x));
  for (isize x = 0; x < pool.pages(); ++x)
    if (pool.references(x) > 0) next(pool.block(static_cast<std::int32_t>(x)), pool.page_bytes(), pool.page_bytes());
  require(rest.empty(), "the saved paged pool has ", rest.size(), " bytes too many");
  return r;
}

}  // namespace FOVEA_ABI
}  // namespace fovea
