// SPDX-License-Identifier: MIT
#pragma once
/// @file  A pool of pages that many sequences share: a sequence is a table of pages, and a page may stand in several tables.
///
///   token j of a sequence lies in row j % page of page pages[j / page];   a page is one block of core/kv_layout.hpp
///
/// Contract   a `page_table` is moved, never copied: `fork` makes a second owner of the same pages, `release` (or truncate to 0) gives
///            them back. append writes a shared last page into a page of its own first (copy on write). What the pool cannot hold is
///            refused before anything changes. Tables belong to the pool that filled them; the pool does not know where they are.
/// Cost       append: one pass over the new rows, and over a last page that is shared; fork: one count a page; truncate: one count a page;
///            shift: table entries for whole pages, one pass over the rows behind `keep` where pages are cut or keys are turned.
/// Source     Kwon et al., Efficient memory management for large language model serving with PagedAttention, arXiv 2309.06180.

#include <algorithm>
#include <vector>

#include <fovea/cache/saved_shape.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

/// One sequence in a pool.
struct page_table {
  std::vector<std::int32_t> pages;
  isize tokens = 0;

  page_table() = default;
  page_table(page_table&& other) noexcept : pages(std::move(other.pages)), tokens(std::exchange(other.tokens, 0)) {}
  page_table& operator=(page_table&& other) noexcept {
    pages = std::exchange(other.pages, {}), tokens = std::exchange(other.tokens, 0);
    return *this;
  }
};

class paged_pool {
 public:
  /// `page` tokens a page, `pages` of them.
  paged_pool(const kv_shape& s, isize page, isize pages) {
    detail::check_kv_shape("paged_pool", s);
    require(page >= 1 && pages >= 0 && pages < (isize{1} << 31), "paged_pool: ", pages, " pages of ", page,
            " tokens; wanted at least 1 token a page, and fewer than 2^31 pages");
    require(s.form == kv_form::rows || page % packed_rows == 0, "paged_pool: pages of ", page,
            " tokens; packed rows come in pages of a multiple of ", packed_rows);
    layout_ = kv_layout(s, page);
    require(static_cast<double>(layout_.bytes()) * static_cast<double>(pages) < 0x1p62, "paged_pool: ", pages,
            " pages of ", page, " tokens are more than memory can be");
    memory_ = buffer(layout_.bytes() * static_cast<std::size_t>(pages));
    references_.assign(static_cast<std::size_t>(pages), 0);
    for (isize x = pages; x-- > 0;) free_.push_back(static_cast<std::int32_t>(x));
    scratch_.resize(static_cast<std::size_t>(s.d > s.e ? s.d : s.e));
  }

  const kv_shape& shape() const { return layout_.shape(); }
  isize page() const { return layout_.rows(); }
  isize pages() const { return static_cast<isize>(references_.size()); }
  isize free_pages() const { return static_cast<isize>(free_.size()); }
  std::size_t page_bytes() const { return layout_.bytes(); }
  std::size_t bytes() const { return memory_.size(); }
  /// In how many tables page x stands.
  isize references(isize x) const { return references_[static_cast<std::size_t>(x)]; }

  /// Pages that `append` of so many tokens would take, a copy of a shared last page included.
  isize pages_for(const page_table& t, isize count) const {
    if (count == 0) return 0;
    const isize fresh = ceil_div(t.tokens + count, page()) - static_cast<isize>(t.pages.size());
    return fresh + (t.tokens % page() != 0 && shared(t, t.tokens / page()) ? 1 : 0);
  }
  void check_append(const page_table& t, const tensor_ref& k, const tensor_ref& v, const key_positions& at) const {
    detail::check_append("paged pool", shape(), k, v, at);
    require_pages(pages_for(t, k.length), "append of ", k.length);
  }
  void append(page_table& t, const tensor_ref& k, const tensor_ref& v, const key_positions& at) {
    check_append(t, k, v, at);
    if (k.length == 0) return;
    if (t.tokens % page() != 0) own(t, t.tokens / page());
    t.pages.reserve(static_cast<std::size_t>(ceil_div(t.tokens + k.length, page())));
    while (static_cast<isize>(t.pages.size()) * page() < t.tokens + k.length) t.pages.push_back(take());
    const detail::row_writer writer(shape(), scratch_.data());
    detail::write_tokens(layout_, writer, k, v, 0, shape().heads, 0, 0, k.length, at, [&](isize i, isize& row) {
      row = (t.tokens + i) % page();
      return block(t.pages[static_cast<std::size_t>((t.tokens + i) / page())]);
    });
    t.tokens += k.length;
  }
  void append(page_table& t, const tensor_ref& k, const tensor_ref& v, const rope* turn = nullptr) {
    append(t, k, v, key_positions{turn, t.tokens, nullptr});
  }

  /// A second sequence with the same tokens, on the same pages.
  page_table fork(const page_table& t) {
    page_table other;
    other.pages = t.pages, other.tokens = t.tokens;
    for (const std::int32_t x : t.pages) ++references_[static_cast<std::size_t>(x)];
    return other;
  }
  void truncate(page_table& t, isize tokens) {
    require(tokens >= 0 && tokens <= t.tokens, "truncate to ", tokens, " tokens; the sequence holds ", t.tokens);
    t.tokens = tokens;
    while (static_cast<isize>(t.pages.size()) > ceil_div(tokens, page())) {
      give(t.pages.back());
      t.pages.pop_back();
    }
  }
  void release(page_table& t) { truncate(t, 0); }

  /// Tokens [keep, keep + count) go, the keys behind them turn back by `count` positions (not at all without `turn`).
  void shift(page_table& t, isize count, isize keep = 0, const rope* turn = nullptr) {
    detail::check_shift("sequence", shape(), t.tokens, count, keep, turn);
    if (count == 0) return;
    // Whole pages leave the table; [keep, keep + rest) is left to be dropped by moving rows.
    const isize a = ceil_div(keep, page()), b = (keep + count) / page(), whole = b > a ? b - a : 0,
                rest = count - whole * page(), left = t.tokens - count;
    const isize first_written = keep / page(), last_written = ceil_div(left, page());
    const bool moves = left > keep && (rest > 0 || turn != nullptr);
    const auto after = [&](isize x) { return x < a ? x : x + whole; };  // index in the table as it is now
    isize need = 0;
    for (isize x = first_written; moves && x < last_written; ++x) need += shared(t, after(x)) ? 1 : 0;
    require_pages(need, "shift by ", count);
    for (isize x = a; x < a + whole; ++x) give(t.pages[static_cast<std::size_t>(x)]);
    if (whole > 0) t.pages.erase(t.pages.begin() + a, t.pages.begin() + a + whole);
    t.tokens -= whole * page();
    for (isize x = first_written; moves && x < last_written; ++x) own(t, x);
    if (moves) move_rows(t, keep, rest, left, turn, count);
    truncate(t, left);
  }

  /// The sequence for a call; it points to the table's own numbers, which must stay until the call is over.
  kv_sequence view(const page_table& t) const {
    kv_sequence s = layout_.sequence(memory_.data(), 0, shape().heads, t.tokens);
    for (row_source* x : {&s.k, &s.v}) {
      x->table = t.pages.data(), x->page = page(), x->page_bytes = static_cast<isize>(layout_.bytes());
      x->page_scales = static_cast<isize>(layout_.bytes() / sizeof(float));
    }
    return s;
  }

  /// Moves pages down until those in use are the first ones, and changes the tables, which must be all that there are.
  void defragment(std::span<page_table* const> tables) {
    check_all(tables);
    const isize used = pages() - free_pages();
    std::vector<std::int32_t> place(references_.size()), holes;
    for (isize x = 0; x < used; ++x)
      if (references(x) == 0) holes.push_back(static_cast<std::int32_t>(x));
    std::size_t hole = 0;
    for (isize x = 0; x < pages(); ++x) {
      place[static_cast<std::size_t>(x)] = static_cast<std::int32_t>(x);
      if (x < used || references(x) == 0) continue;
      const std::int32_t to = holes[hole++];
      std::memcpy(block(to), block(static_cast<std::int32_t>(x)), layout_.bytes());
      place[static_cast<std::size_t>(x)] = to;
      std::swap(references_[static_cast<std::size_t>(x)], references_[static_cast<std::size_t>(to)]);
    }
    for (page_table* t : tables)
      for (std::int32_t& x : t->pages) x = place[static_cast<std::size_t>(x)];
    free_.clear();
    for (isize x = pages(); x-- > used;) free_.push_back(static_cast<std::int32_t>(x));
  }

  /// The pool with the tables given, which must be all that there are; pages that are free are left out.
  std::vector<std::byte> save(std::span<const page_table* const> tables) const;
  struct restored;
  static restored restore(std::span<const std::byte> bytes);

 private:
  static constexpr char magic[8] = "FOVEAPP";
  static constexpr std::uint32_t version = 1;

  std::byte* block(std::int32_t x) const { return memory_.data() + static_cast<std::size_t>(x) * layout_.bytes(); }
  bool shared(const page_table& t, isize x) const { return references(t.pages[static_cast<std::size_t>(x)]) > 1; }
  template <class... What>
  void require_pages(isize need, const What&... what) const {
    require(need <= free_pages(), what..., " tokens takes ", need, " pages of ", page(), " tokens; ", free_pages(),
            " of ", pages(), " are free");
  }
  std::int32_t take() {
    const std::int32_t x = free_.back();
    free_.pop_back();
    references_[static_cast<std::size_t>(x)] = 1;
    std::memset(block(x), 0, layout_.bytes());  // save() writes whole pages
    return x;
  }
  void give(std::int32_t x) {
    if (--references_[static_cast<std::size_t>(x)] == 0) free_.push_back(x);
  }
  /// Makes the x-th page of a table one that no other table has.
  void own(page_table& t, isize x) {
    if (!shared(t, x)) return;
    std::int32_t& at = t.pages[static_cast<std::size_t>(x)];
    const std::int32_t fresh = take();
    std::memcpy(block(fresh), block(at), layout_.bytes());
    give(at);
    at = fresh;
  }
  /// Rows from `keep` on become those `rest` behind them, for tokens below `left`.
  void move_rows(page_table& t, isize keep, isize rest, isize left, const rope* turn, isize turn_back) {
    const detail::row_writer writer(shape(), scratch_.data());
    const auto page_of = [&](isize j) { return block(t.pages[static_cast<std::size_t>(j / page())]); };
    for (isize g = 0; g < shape().heads; ++g)
      for (isize j = keep; j < left; ++j) {
        const isize from = j + rest;
        writer.move(layout_.key(page_of(from), g, from % page()), shape().d, turn, turn_back,
                    layout_.key(page_of(j), g, j % page()));
        if (!shape().values_in_keys)
          writer.move(layout_.value(page_of(from), g, from % page()), shape().e, nullptr, 0,
                      layout_.value(page_of(j), g, j % page()));
      }
  }
  template <class Table>
  void check_all(std::span<Table* const> tables) const {
    std::vector<std::int32_t> seen(references_.size(), 0);
    for (const page_table* t : tables)
      for (const std::int32_t x : t->pages) {
        require(x >= 0 && x < pages(), "a table names page ", x, " of ", pages(), "; it is not of this pool");
        ++seen[static_cast<std::size_t>(x)];
      }
    for (isize x = 0; x < pages(); ++x)
      require(seen[static_cast<std::size_t>(x)] == references(x), "page ", x, " stands in ", references(x),
              " tables, of which ", seen[static_cast<std::size_t>(x)], " were given; all are needed");
  }

  kv_layout layout_;
  std::vector<std::int32_t> references_, free_;
  buffer memory_;
  std::vector<double> scratch_;
};

struct paged_pool::restored {
  paged_pool pool;
  std::vector<page_table> tables;
};

}  // namespace FOVEA_ABI
}  // namespace fovea

#include <fovea/cache/paged_save.hpp>
