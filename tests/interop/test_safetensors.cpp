// SPDX-License-Identifier: MIT
/// @file  Safetensors: what is written is read back; a header that lies is refused before any data is touched.

#include <filesystem>
#include <fstream>
#include <string>

#include <fovea/interop/safetensors.hpp>

#include "interop/files.hpp"

namespace {

using fovea::array;
using fovea::element;
using test::folder;
using test::holds;
using test::message_of;
using test::put;

std::string bytes_of(const std::string& header, std::size_t data, std::uint64_t length) {
  std::string s(8, '\0');
  std::memcpy(s.data(), &length, 8);
  return s + header + std::string(data, '\x01');
}
std::string bytes_of(const std::string& header, std::size_t data) { return bytes_of(header, data, header.size()); }

/// The one line that refuses these bytes; it names the file.
std::string refusal(const std::string& bytes) {
  const folder f;
  const std::string path = f.file("bad.safetensors");
  put(path, bytes);
  const std::string line = message_of<fovea::file_error>([&] { (void)fovea::read_safetensors(path); });
  return line.starts_with(path + ": ") ? line.substr(path.size() + 2) : line;
}

}  // namespace

TEST_CASE("safetensors: every element type survives a round trip") {
  const folder f;
  fovea::arrays out;
  out["f32"] = array({2, 3}, std::vector<float>{1.F, -2.5F, 3e38F, 1e-40F, 0.F, -0.F});
  out["f64"] = array({1, 2, 1}, std::vector<double>{1e300, -1.0 / 3.0});
  out["f16"] = array({2}, std::vector<fovea::f16>{fovea::f16(0.5F), fovea::f16(-65504.F)});
  out["bf16"] = array({2}, std::vector<fovea::bf16>{fovea::bf16(0.5F), fovea::bf16(1e30F)});
  out["u8"] = array({3}, std::vector<std::uint8_t>{0, 1, 255});
  out["i32"] = array({2}, std::vector<std::int32_t>{-7, 2147483647});
  out["i64"] = array({1}, std::vector<std::int64_t>{-9007199254740993});
  out["u32"] = array({1}, std::vector<std::uint32_t>{4294967295U});
  out["empty"] = array({4, 0, 2}, std::vector<float>{});
  out["scalar"] = array({}, std::vector<float>{4.F});
  out["odd \"name\"\n\\/\xc3\xa9"] = array({1}, std::vector<float>{9.F});
  array truth(element::boolean, {2});
  static_cast<std::uint8_t*>(truth.mutable_data())[1] = 1;
  out["bool"] = truth;
  fovea::write_safetensors(f.file("a.safetensors"), out, {{"model", "a \"b\""}});
  CHECK(f.files() == 1);

  const auto in = fovea::read_safetensors(f.file("a.safetensors"));
  CHECK(in.metadata == fovea::safetensors_metadata{{"model", "a \"b\""}});
  REQUIRE(in.tensors.size() == out.size());
  for (const auto& [name, want] : out) {
    INFO(name);
    const array& got = in.tensors.at(name);
    CHECK(got.type() == want.type());
    CHECK(got.dims() == want.dims());
    REQUIRE(got.bytes() == want.bytes());
    if (got.bytes() > 0) CHECK(std::memcmp(got.data(), want.data(), got.bytes()) == 0);
  }
  CHECK(in.tensors.at("u32").at(0) == 4294967295.0);
  CHECK(in.tensors.at("f16").floats() == std::vector<float>{0.5F, -65504.F});
}

TEST_CASE("safetensors: one tensor is read without the others, data is aligned in the file") {
  const folder f;
  fovea::write_safetensors(f.file("a.safetensors"), {{"a", array({3}, std::vector<std::uint8_t>{1, 2, 3})},
                                                     {"b", array({2}, std::vector<double>{4, 5})}});
  fovea::safetensors_reader r(f.file("a.safetensors"));
  CHECK(r.contains("b"));
  CHECK(r.load("b").at(1) == 5.0);
  CHECK(r.entries().at("b").begin % 8 == 0);
  CHECK(holds(message_of([&] { (void)r.load("c"); }), "has no tensor \"c\""));
}

TEST_CASE("safetensors: escapes and spaces in a header") {
  const std::string header =
      R"( {"\u0071\u00e9\ud83d\ude00" : { "shape":[ 1 ] ,"data_offsets":[0,4], "dtype":"F32"}, "__metadata__":{"a":"\t\/"}})";
  // The original implementation wants '{' first; so do we.
  CHECK(holds(refusal(bytes_of(header, 4)), "does not start with '{'"));
  const auto h = fovea::parse_safetensors_header(header.substr(1), 4, "x");
  CHECK(h.entries.contains("q\xc3\xa9\xf0\x9f\x98\x80"));
  CHECK(h.metadata.at("a") == "\t/");
}

TEST_CASE("safetensors: headers that lie") {
  const std::string good = R"({"q":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})";
  CHECK(refusal(bytes_of(good, 24)) == "nothing was thrown");
  const auto with = [&](const std::string& from, const std::string& to) {
    std::string s = good;
    s.replace(s.find(from), from.size(), to);
    return s;
  };
  const std::string second = R"(,"k":{"dtype":"F32","shape":[1],"data_offsets":)";
  struct bad {
    const char* what;
    std::string bytes, wanted;
  };
  const bad list[] = {
      {"empty file", "", "0 bytes long"},
      {"seven bytes", "1234567", "7 bytes long"},
      {"header longer than the file", bytes_of(good, 0, 1000), "announces a header of 1000 bytes"},
      {"header length near 2^64", bytes_of(good, 24, UINT64_MAX), "announces a header of 18446744073709551615 bytes"},
      {"header length that cuts it", bytes_of(good, 24, good.size() - 1), "unexpected end of input"},
      {"header length 0", bytes_of("", 0), "does not start with '{'"},
      {"truncated data", bytes_of(good, 23), "lie outside the file"},
      {"more data than tensors", bytes_of(good, 25), "belong to no tensor"},
      {"offsets outside", bytes_of(with("[0,24]", "[8,32]"), 24), "lie outside the file"},
      {"offsets reversed", bytes_of(with("[0,24]", "[24,0]"), 24), "end before they begin"},
      {"offsets too short", bytes_of(with("[0,24]", "[0,20]"), 24), "needs 24"},
      {"gap before the data", bytes_of(with("[0,24]", "[4,28]"), 28), "belong to no tensor"},
      {"one offset", bytes_of(with("[0,24]", "[0]"), 24), "wanted 2"},
      {"three offsets", bytes_of(with("[0,24]", "[0,24,1]"), 24), "more than 2"},
      {"negative offset", bytes_of(with("[0,24]", "[-8,16]"), 24), "non-negative integer"},
      {"fraction", bytes_of(with("[0,24]", "[0,24.0]"), 24), "non-negative integer"},
      {"leading zero", bytes_of(with("[0,24]", "[00,24]"), 24), "syntax error"},
      {"number above 2^64", bytes_of(with("[2,3]", "[2,99999999999999999999]"), 24), "at most 64 bits"},
      {"product overflows to 24", bytes_of(with("[2,3]", "[4611686018427387904,6]"), 24), "too large"},
      {"product overflows to 0", bytes_of(with("[2,3]", "[4294967296,4294967296]"), 24), "too large"},
      {"empty and huge", bytes_of(R"({"q":{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}})", 0),
       "too large"},
      {"dimension above isize", bytes_of(with("[2,3]", "[9223372036854775808]"), 24), "too large"},
      {"rank 17", bytes_of(with("[2,3]", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]"), 24), "more than 16"},
      {"unknown dtype", bytes_of(with("F32", "F8_E4M3"), 24), "dtype \"F8_E4M3\" is not supported"},
      {"dtype is a number", bytes_of(with("\"F32\"", "32"), 24), "dtype must be a string"},
      {"dtype missing", bytes_of(with("\"dtype\":\"F32\",", ""), 24), "dtype is missing"},
      {"shape missing", bytes_of(with("\"shape\":[2,3],", ""), 24), "shape is missing"},
      {"offsets missing", bytes_of(with(",\"data_offsets\":[0,24]", ""), 24), "data_offsets is missing"},
      {"dtype twice", bytes_of(with("\"dtype\":\"F32\"", "\"dtype\":\"F32\",\"dtype\":\"F32\""), 24), "twice"},
      {"unknown field", bytes_of(with("\"dtype\"", "\"strides\":[1],\"dtype\""), 24), "\"strides\" is unknown"},
      {"tensor is a list", bytes_of(R"({"q":[]})", 0), "wanted an object"},
      {"same name twice", bytes_of(good.substr(0, good.size() - 1) + "," + good.substr(1), 24),
       "key \"q\" is there twice"},
      {"same bytes twice", bytes_of(good.substr(0, good.size() - 1) + second + "[0,4]}}", 24), "shares bytes"},
      {"overlapping bytes", bytes_of(good.substr(0, good.size() - 1) + second + "[20,24]}}", 24), "shares bytes"},
      {"metadata twice", bytes_of(R"({"__metadata__":{},"__metadata__":{}})", 0), "twice"},
      {"metadata not text", bytes_of(R"({"__metadata__":{"a":1}})", 0), "must be a string"},
      {"metadata nested", bytes_of(R"({"__metadata__":{"a":{"b":"c"}}})", 0), "must be a string"},
      {"not an object", bytes_of("[]", 0), "does not start with '{'"},
      {"deep nesting", bytes_of(std::string(100000, '{'), 0), "syntax error"},
      {"text after the header", bytes_of(good + "{}", 24), "expected end of input"},
      {"comma at the end", bytes_of(with("}}", "},}"), 24), "syntax error"},
      {"string without an end", bytes_of(R"({"q)", 0), "missing closing quote"},
      {"half a surrogate pair", bytes_of(R"({"\ud800":{}})", 0), "surrogate"},
      {"bad escape", bytes_of(R"({"\x":{}})", 0), "forbidden character"},
      {"control character", bytes_of("{\"q\n\":{}}", 0), "control character"},
  };
  for (const bad& b : list) {
    INFO(b.what);
    CHECK(holds(refusal(b.bytes), b.wanted));
  }
}

TEST_CASE("safetensors: no change of one header byte does harm") {
  const folder f;
  fovea::write_safetensors(
      f.file("a.safetensors"),
      {{"q", array({2, 3}, std::vector<float>(6, 1.F))}, {"k", array({5}, std::vector<std::uint8_t>(5, 1))}},
      {{"a", "b"}});
  std::string good(static_cast<std::size_t>(std::filesystem::file_size(f.file("a.safetensors"))), '\0');
  std::ifstream(f.file("a.safetensors"), std::ios::binary).read(good.data(), static_cast<std::streamsize>(good.size()));
  std::uint64_t length = 0;
  std::memcpy(&length, good.data(), 8);
  int refused = 0, accepted = 0;
  for (std::size_t i = 0; i < 8 + length; ++i)
    for (const int bit : {0, 1, 2, 3, 4, 5, 6, 7, -1, -2, -3}) {
      std::string bytes = good;
      bytes[i] = bit >= 0 ? static_cast<char>(bytes[i] ^ (1 << bit)) : "\"{9"[-bit - 1];
      put(f.file("b.safetensors"), bytes);
      try {
        const auto in =
            fovea::read_safetensors(f.file("b.safetensors"));  // a changed name is fine; a changed size is not
        for (const auto& [name, a] : in.tensors) REQUIRE(a.bytes() <= 29);
        ++accepted;
      } catch (const fovea::file_error&) {
        ++refused;
      }
    }
  CHECK(refused > accepted);
  for (std::size_t n = 0; n < good.size(); ++n) {
    put(f.file("b.safetensors"), good.substr(0, n));
    CHECK_THROWS_AS(fovea::read_safetensors(f.file("b.safetensors")), fovea::file_error);
  }
}

TEST_CASE("files: what cannot be read or written is named, and nothing is left behind") {
  const folder f;
  CHECK(holds(message_of([&] { (void)fovea::read_safetensors(f.file("none")); }), "none: no such file"));
  CHECK(holds(message_of([&] { (void)fovea::read_safetensors(f.path.string()); }), "not a regular file"));
  CHECK(holds(message_of([&] { fovea::write_safetensors(f.file("no/such/folder"), {}); }), "cannot be written"));
  CHECK(holds(message_of([&] { fovea::write_safetensors(f.path.string(), {}); }), "not a regular file"));
  put(f.file("old"), "old");
  CHECK_THROWS_AS(fovea::write_whole(f.file("old"),
                                     [](std::ofstream& out) {
                                       out << "new";
                                       throw std::runtime_error("stop");
                                     }),
                  std::runtime_error);
  CHECK(fovea::read_text(f.file("old"), 10) == "old");
  CHECK(f.files() == 1);
  fovea::write_whole(f.file("old"), [](std::ofstream& out) { out << "newer"; });
  CHECK(fovea::read_text(f.file("old"), 10) == "newer");
  CHECK(holds(message_of([&] { (void)fovea::read_text(f.file("old"), 4); }), "at most 4"));
  std::filesystem::create_symlink(f.file("old"), f.file("link"));
  fovea::write_whole(f.file("link"), [](std::ofstream& out) { out << "through"; });
  CHECK(std::filesystem::is_symlink(f.file("link")));
  CHECK(fovea::read_text(f.file("old"), 10) == "through");
}
