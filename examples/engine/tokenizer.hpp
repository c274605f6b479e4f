// SPDX-License-Identifier: MIT
#pragma once
/// @file  Byte-level BPE with a model's own vocabulary and merges, read from a Hugging Face tokenizer.json.
///
///   text -> special tokens cut out -> pieces by GPT-2's pattern -> bytes as symbols -> merges, the earliest rank first
///
///   's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+       digits one by one where the file says so
///
/// Contract   the ids are those of the Python package `tokenizers` for the same file (tests/model). Text is UTF-8; a byte that is not is
///            read as U+FFFD. A byte for which the vocabulary has no token is left out, as that package does. Nothing is put in front
///            (no BOS, no blank). `decode` gives the bytes back; `text_stream` gives them in whole characters.
/// Errors     file_error naming what the file holds and this program does not do (a normaliser, another pattern, another model).
/// Cost       about 3 MB/s; a run of n characters without a break takes n log n.

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace engine {

using token = std::uint32_t;

class tokenizer {
 public:
  explicit tokenizer(const std::string& path);

  /// With `special`, texts such as <|im_start|> become their one token; without, they are text like any other.
  std::vector<token> encode(std::string_view text, bool special = true) const;
  std::string decode(std::span<const token> ids) const;
  /// What one token prints as. Empty for an id that the vocabulary does not have.
  const std::string& bytes(token id) const;
  std::optional<token> special(std::string_view text) const;
  std::size_t size() const { return bytes_.size(); }

 private:
  struct merge {
    std::uint32_t rank;
    token into;
  };
  static std::uint64_t pair(token a, token b) { return static_cast<std::uint64_t>(a) << 32 | b; }
  void read_vocabulary(const nlohmann::json& vocabulary, const std::string& path);
  void read_merges(const nlohmann::json& model, const std::string& path);
  void read_splits(const nlohmann::json& pre, const std::string& path);
  void encode_text(std::string_view text, std::vector<token>& out) const;
  void encode_piece(std::string_view piece, std::vector<token>& out) const;

  std::vector<std::string> bytes_;                   // of each id
  std::array<std::optional<token>, 256> byte_;       // the token of a single byte
  std::unordered_map<std::uint64_t, merge> merges_;  // by pair
  std::map<std::string, token, std::less<>> special_;
  std::array<bool, 256> special_starts_{};
  bool single_digits_ = false;
};

/// Tokens in, whole UTF-8 characters out: bytes of a character that is not complete yet are kept back.
class text_stream {
 public:
  explicit text_stream(const tokenizer& t) : tokenizer_(&t) {}
  std::string push(token id);
  /// What is left when no token follows: an incomplete character becomes U+FFFD.
  std::string finish();

 private:
  const tokenizer* tokenizer_;
  std::string held_;
};

}  // namespace engine
