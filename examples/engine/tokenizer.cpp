// SPDX-License-Identifier: MIT
#include "tokenizer.hpp"

#include <algorithm>
#include <queue>

#include <nlohmann/json.hpp>

#include <fovea/interop/json.hpp>

#include "unicode_classes.hpp"

namespace engine {
namespace {

using fovea::file_error;

constexpr std::string_view replacement = "\xEF\xBF\xBD";

character class_of(std::uint32_t c) {
  if (c < 128) {
    const bool letter = (c | 32) >= 'a' && (c | 32) <= 'z', number = c >= '0' && c <= '9';
    return letter                            ? character::letter
           : number                          ? character::number
           : c == ' ' || (c >= 9 && c <= 13) ? character::space
                                             : character::other;
  }
  const auto after = std::upper_bound(std::begin(character_runs), std::end(character_runs), c << 2 | 3);
  return static_cast<character>(*(after - 1) & 3);
}

/// Length of the UTF-8 character at the start of `s` (not empty), 0 if there is none; its number in `c`.
std::size_t read_character(std::string_view s, std::uint32_t& c) {
  const auto byte = [&](std::size_t i) { return static_cast<std::uint32_t>(static_cast<unsigned char>(s[i])); };
  const std::uint32_t first = byte(0);
  if (first < 0x80) return c = first, 1;
  const std::size_t n = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || s.size() < n) return 0;
  c = first & (0x7FU >> n);
  for (std::size_t i = 1; i < n; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
    c = c << 6 | (byte(i) & 0x3F);
  }
  const std::uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  return c < least[n] || c > 0x10FFFF || (c >= 0xD800 && c < 0xE000) ? 0 : n;
}

/// How many bytes at the start of `s` could begin a character that is cut off by the end of `s`.
bool may_continue(std::string_view s) {
  const unsigned first = static_cast<unsigned char>(s[0]);
  const std::size_t n = first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : 2;
  if (first < 0xC2 || first > 0xF4 || s.size() >= n) return false;
  return std::all_of(s.begin() + 1, s.end(), [](char b) { return (static_cast<unsigned char>(b) & 0xC0) == 0x80; });
}

struct piece_character {
  std::size_t at;
  character kind;
};

/// Bytes that the published vocabularies write as themselves; the others are written as U+0100, U+0101, ... in order.
std::array<std::uint32_t, 256> byte_alphabet() {
  std::array<std::uint32_t, 256> letters{};
  std::uint32_t next = 256;
  for (std::uint32_t b = 0; b < 256; ++b) {
    const bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
    letters[b] = plain ? b : next++;
  }
  return letters;
}

/// The number of characters of the piece that starts at text[i], by GPT-2's pattern; the text ends at text[n].
std::size_t piece_length(std::string_view text, const std::vector<piece_character>& c, std::size_t i, std::size_t n) {
  if (text[c[i].at] == '\'') {
    const std::string_view rest = text.substr(c[i].at + 1, c[n].at - c[i].at - 1);
    for (const std::string_view s : {"s", "t", "re", "ve", "m", "ll", "d"})
      if (rest.starts_with(s)) return 1 + s.size();
  }
  const auto run = [&](std::size_t from) {
    std::size_t end = from;
    while (end < n && c[end].kind == c[from].kind) ++end;
    return end - from;
  };
  if (c[i].kind != character::space) return run(i);
  if (text[c[i].at] == ' ' && i + 1 < n && c[i + 1].kind != character::space) return 1 + run(i + 1);
  const std::size_t blanks = run(i);
  return i + blanks < n && blanks > 1 ? blanks - 1 : blanks;  // the last blank belongs to what follows
}

}  // namespace

tokenizer::tokenizer(const std::string& path) try {
  const auto j = nlohmann::json::parse(fovea::read_text(path, 1 << 28), nullptr, false);
  if (!j.is_object() || !j.contains("model") || !j["model"].is_object())
    throw file_error(path, "is no tokenizer.json: an object with a \"model\" was wanted");
  const auto& model = j["model"];
  if (model.value("type", "BPE") != "BPE")
    throw file_error(path, "the model is of type " + model["type"].dump() + "; only \"BPE\" is known");
  if (j.contains("normalizer") && !j["normalizer"].is_null())
    throw file_error(path, "has a normalizer; only byte-level models without one are known");
  if (!model.contains("vocab") || !model["vocab"].is_object() || !model.contains("merges") ||
      !model["merges"].is_array())
    throw file_error(path, "the model needs \"vocab\" (an object) and \"merges\" (a list)");
  read_splits(j.value("pre_tokenizer", nlohmann::json()), path);
  read_vocabulary(model["vocab"], path);
  read_merges(model, path);
  for (const auto& added : j.value("added_tokens", nlohmann::json::array())) {
    const auto id = added.at("id").get<token>();
    if (id >= bytes_.size()) bytes_.resize(id + 1);
    bytes_[id] = added.at("content").get<std::string>();
    if (bytes_[id].empty()) continue;
    special_.emplace(bytes_[id], id);
    special_starts_[static_cast<unsigned char>(bytes_[id][0])] = true;
  }
} catch (const nlohmann::json::exception& e) {
  throw file_error(path, e.what());
}

void tokenizer::read_splits(const nlohmann::json& pre, const std::string& path) {
  const auto steps = pre.is_object() && pre.contains("pretokenizers") ? pre["pretokenizers"] : nlohmann::json{pre};
  bool bytes = false;
  for (const auto& step : steps) {
    const std::string type = step.is_object() ? step.value("type", "") : "";
    if (type == "Digits" && step.value("individual_digits", false) && !bytes)
      single_digits_ = true;
    else if (type == "ByteLevel" && !step.value("add_prefix_space", true) && step.value("use_regex", true))
      bytes = true;
    else
      throw file_error(path,
                       "pre_tokenizer " + step.dump().substr(0, 80) +
                           " is not known; wanted ByteLevel without prefix space, after Digits one by one or alone");
  }
  if (!bytes) throw file_error(path, "has no ByteLevel pre_tokenizer");
}

void tokenizer::read_vocabulary(const nlohmann::json& vocabulary, const std::string& path) {
  std::unordered_map<std::uint32_t, char> byte_of;
  const auto alphabet = byte_alphabet();
  for (std::size_t b = 0; b < 256; ++b) byte_of[alphabet[b]] = static_cast<char>(b);
  bytes_.resize(vocabulary.size());
  for (const auto& [text, id_value] : vocabulary.items()) {
    const auto id = id_value.get<std::int64_t>();
    if (id < 0 || id > 1 << 24) throw file_error(path, "token \"" + text + "\" has the id " + std::to_string(id));
    if (static_cast<std::size_t>(id) >= bytes_.size()) bytes_.resize(static_cast<std::size_t>(id) + 1);
    std::string& bytes = bytes_[static_cast<std::size_t>(id)];
    std::uint32_t c = 0;
    for (std::string_view rest = text; !rest.empty();) {
      const std::size_t n = read_character(rest, c);
      const auto at = byte_of.find(c);
      if (n == 0 || at == byte_of.end()) {  // not in the alphabet: an added token, written as it is
        bytes = text;
        break;
      }
      bytes.push_back(at->second), rest.remove_prefix(n);
    }
    if (bytes.size() == 1) byte_[static_cast<unsigned char>(bytes[0])] = static_cast<token>(id);
  }
}

void tokenizer::read_merges(const nlohmann::json& model, const std::string& path) {
  std::unordered_map<std::string, token> ids;
  for (const auto& [text, id] : model["vocab"].items()) ids.emplace(text, id.get<token>());
  const auto find = [&](const std::string& s) {
    const auto at = ids.find(s);
    if (at == ids.end()) throw file_error(path, "a merge names \"" + s + "\", which is not in the vocabulary");
    return at->second;
  };
  std::uint32_t rank = 0;
  merges_.reserve(model["merges"].size());
  for (const auto& m : model["merges"]) {  // "a b", or ["a", "b"] in newer files
    const std::string text = m.is_string() ? m.get<std::string>() : "";
    const auto cut = text.find(' ');
    if (m.is_string() ? cut == std::string::npos : !(m.is_array() && m.size() == 2))
      throw file_error(path, "merge " + m.dump() + " is not a pair");
    const std::string a = m.is_string() ? text.substr(0, cut) : m[0].get<std::string>();
    const std::string b = m.is_string() ? text.substr(cut + 1) : m[1].get<std::string>();
    merges_.emplace(pair(find(a), find(b)), merge{rank++, find(a + b)});
  }
}

std::optional<token> tokenizer::special(std::string_view text) const {
  const auto at = special_.find(text);
  return at == special_.end() ? std::nullopt : std::optional<token>(at->second);
}

const std::string& tokenizer::bytes(token id) const {
  static const std::string none;
  return id < bytes_.size() ? bytes_[id] : none;
}

std::string tokenizer::decode(std::span<const token> ids) const {
  std::string text;
  for (const token id : ids) text += bytes(id);
  return text;
}

std::vector<token> tokenizer::encode(std::string_view text, bool special) const {
  std::vector<token> out;
  out.reserve(text.size() / 3 + 8);
  std::size_t start = 0;
  for (std::size_t i = 0; special && i < text.size(); ++i) {
    if (!special_starts_[static_cast<unsigned char>(text[i])]) continue;
    const std::pair<const std::string, token>* best = nullptr;  // the longest that starts here
    for (const auto& s : special_)
      if (text.substr(i).starts_with(s.first) && (best == nullptr || s.first.size() > best->first.size())) best = &s;
    if (best == nullptr) continue;
    encode_text(text.substr(start, i - start), out);
    out.push_back(best->second);
    start = i + best->first.size(), i = start - 1;
  }
  encode_text(text.substr(start), out);
  return out;
}

void tokenizer::encode_text(std::string_view raw, std::vector<token>& out) const {
  std::string text;
  std::vector<piece_character> c;
  c.reserve(raw.size() + 1);
  text.reserve(raw.size());
  while (!raw.empty()) {
    std::uint32_t code = 0xFFFD;
    const std::size_t n = read_character(raw, code);
    c.push_back({text.size(), n == 0 ? character::other : class_of(code)});
    text += n == 0 ? replacement : raw.substr(0, n);
    raw.remove_prefix(std::max<std::size_t>(n, 1));
  }
  c.push_back({text.size(), character::other});
  const std::size_t all = c.size() - 1;
  const auto emit = [&](std::size_t from, std::size_t to) {
    encode_piece(std::string_view(text).substr(c[from].at, c[to].at - c[from].at), out);
  };
  for (std::size_t start = 0; start < all;) {  // a stretch: one digit, or up to the next digit
    std::size_t end = start;
    if (!single_digits_)
      end = all;
    else
      do ++end;
      while (end < all && c[start].kind != character::number && c[end].kind != character::number);
    while (start < end) {
      const std::size_t n = piece_length(text, c, start, end);
      emit(start, start + n);
      start += n;
    }
  }
}

/// Symbols form a list; candidates wait in a queue, the lowest rank first, the leftmost of equal ones.
void tokenizer::encode_piece(std::string_view piece, std::vector<token>& out) const {
  struct symbol {
    token id;
    int before, after;
  };
  struct candidate {
    std::uint32_t rank;
    int left;
    token a, b, into;
    bool operator>(const candidate& o) const { return rank != o.rank ? rank > o.rank : left > o.left; }
  };
  std::vector<symbol> symbols;
  for (const char b : piece)
    if (const auto id = byte_[static_cast<unsigned char>(b)]) {
      const int i = static_cast<int>(symbols.size());
      symbols.push_back({*id, i - 1, i + 1});
    }
  if (symbols.empty()) return;
  symbols.back().after = -1;
  const auto at = [&](int i) -> symbol& { return symbols[static_cast<std::size_t>(i)]; };
  std::priority_queue<candidate, std::vector<candidate>, std::greater<>> queue;
  const auto consider = [&](int left) {
    if (left < 0 || at(left).after < 0) return;
    const token a = at(left).id, b = at(at(left).after).id;
    if (const auto m = merges_.find(pair(a, b)); m != merges_.end())
      queue.push({m->second.rank, left, a, b, m->second.into});
  };
  constexpr token gone = ~token{0};
  for (int i = 0; i < static_cast<int>(symbols.size()); ++i) consider(i);
  while (!queue.empty()) {
    const candidate m = queue.top();
    queue.pop();
    symbol& left = at(m.left);
    if (left.id != m.a || left.after < 0 || at(left.after).id != m.b) continue;  // one of the two was merged since
    const int eaten = left.after;
    left.id = m.into, left.after = at(eaten).after, at(eaten).id = gone;
    if (left.after >= 0) at(left.after).before = m.left;
    consider(left.before), consider(m.left);
  }
  for (int i = 0; i >= 0; i = at(i).after) out.push_back(at(i).id);
}

std::string text_stream::push(token id) {
  held_ += tokenizer_->bytes(id);
  std::string out;
  std::string_view rest = held_;
  while (!rest.empty()) {
    std::uint32_t c = 0;
    const std::size_t n = read_character(rest, c);
    if (n == 0 && may_continue(rest)) break;
    out += n == 0 ? replacement : rest.substr(0, n);
    rest.remove_prefix(std::max<std::size_t>(n, 1));
  }
  held_ = std::string(rest);
  return out;
}

std::string text_stream::finish() {
  const std::string out(held_.empty() ? std::string_view() : replacement);
  held_.clear();
  return out;
}

}  // namespace engine
