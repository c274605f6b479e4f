// SPDX-License-Identifier: MIT
#include "judged_text.hpp"

#include <algorithm>
#include <filesystem>

#include "error.hpp"
#include "text.hpp"

namespace engine {
namespace {

constexpr isize piece_tokens = 16;

std::vector<isize> starts(const std::string& name, std::size_t tokens, isize each, isize windows) {
  const auto all = static_cast<isize>(tokens);
  if (windows < 1) refuse("windows is ", windows, "; it must be at least 1");
  if (all < each * windows) refuse(name, ": has ", all, " tokens; ", windows, " windows take ", each * windows);
  std::vector<isize> at;
  for (isize w = 0; w < windows; ++w) at.push_back(windows == 1 ? 0 : (all - each) / (windows - 1) * w);
  return at;
}

/// The same order on every machine: splitmix64, Fisher and Yates.
void shuffle(std::vector<isize>& x, std::uint64_t seed) {
  std::uint64_t s = seed;
  for (std::size_t i = x.size(); i > 1; --i) {
    std::uint64_t z = (s += 0x9e3779b97f4a7c15ULL);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebULL;
    std::swap(x[i - 1], x[(z ^ (z >> 31)) % i]);
  }
}

}  // namespace

isize judged_text::predictions() const {
  isize n = 0;
  for (const judged_window& w : windows) n += static_cast<isize>(w.tokens.size()) - w.from;
  return n;
}

judged_text plain_text(const std::string& name, std::span<const token> ids, isize context, isize windows) {
  if (context < 2) refuse("a window of ", context, " tokens predicts nothing; wanted at least 2");
  judged_text t{name, name, false, {}};
  for (const isize at : starts(name, ids.size(), context, windows))
    t.windows.push_back({{ids.begin() + at, ids.begin() + at + context}, 1});
  return t;
}

judged_text copy_text(const std::string& name, std::span<const token> ids, isize context, isize windows) {
  const isize pieces = context / 2 / piece_tokens, half = pieces * piece_tokens;
  if (pieces < 2) refuse("the copy text needs a context of at least ", 4 * piece_tokens, " tokens; it is ", context);
  judged_text t{"copy of " + name, name, true, {}};
  for (const isize at : starts(name, ids.size(), half, windows)) {
    std::vector<isize> order(static_cast<std::size_t>(pieces));
    for (isize i = 0; i < pieces; ++i) order[static_cast<std::size_t>(i)] = i;
    shuffle(order, static_cast<std::uint64_t>(at) + 1);
    judged_window w{{}, half};
    for (int twice = 0; twice < 2; ++twice)
      for (const isize i : order)
        w.tokens.insert(w.tokens.end(), ids.begin() + at + i * piece_tokens, ids.begin() + at + (i + 1) * piece_tokens);
    t.windows.push_back(std::move(w));
  }
  return t;
}

std::vector<judged_text> choose_texts(const text_choice& c, const std::string& model_directory) {
  if (c.files.empty()) refuse("no text is given");
  const auto read = [&](const std::string& file) {
    return read_tokens(file, model_directory, !file.ends_with(".bin"));
  };
  const auto name = [](const std::string& file) { return std::filesystem::path(file).stem().string(); };
  const auto part = [&](const std::vector<token>& ids) {
    const auto at = [&](double share) { return static_cast<std::size_t>(share * static_cast<double>(ids.size())); };
    return std::span<const token>(ids).subspan(at(c.first), at(c.last) - at(c.first));
  };
  std::vector<judged_text> texts;
  for (const std::string& file : c.files) {
    const std::vector<token> ids = read(file);
    texts.push_back(plain_text(name(file), part(ids), c.context, c.windows));
  }
  if (!c.without_copy) {
    const std::string& file = c.copy.empty() ? c.files.front() : c.copy;
    const std::vector<token> ids = read(file);
    texts.push_back(copy_text(name(file), part(ids), c.context, c.windows));
  }
  return texts;
}

}  // namespace engine
