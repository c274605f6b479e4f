// SPDX-License-Identifier: MIT
#pragma once
/// @file  Q, K, V of one layer from a safetensors file, as f32 [1, H, n, d], with what the file says about itself.

#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include <fovea/interop/safetensors.hpp>

namespace compare {

using fovea::isize;

struct input {
  std::string path, file, model, text;
  int layer = -1;  ///< -1: the file does not say
  bool causal = true;
  double scale = 0;
  isize H = 0, G = 0, n = 0, d = 0, e = 0;
  isize from = 0;    ///< the first row that errors are measured on
  isize decode = 0;  ///< so many rows at the end come in steps, where the mechanism has them
  std::vector<float> q, k, v;
  std::vector<double> exact;  ///< [H, n, e], computed in double

  fovea::shape shape() const { return {1, H, G, n, n, d, e, fovea::dtype::f32}; }
  fovea::view<const float> Q() const { return fovea::bhnd(q.data(), 1, H, n, d); }
  fovea::view<const float> K() const { return fovea::bhnd(k.data(), 1, G, n, d); }
  fovea::view<const float> V() const { return fovea::bhnd(v.data(), 1, G, n, e); }
};

namespace detail {
inline std::string text_of(const fovea::safetensors_file& f, const std::string& key) {
  const auto at = f.metadata.find(key);
  return at == f.metadata.end() ? "" : at->second;
}
inline double number_of(const input& in, const std::string& key, const std::string& text) {
  try {
    std::size_t used = 0;
    const double x = std::stod(text, &used);
    if (used == text.size() && std::isfinite(x)) return x;
  } catch (const std::exception&) {
  }
  throw fovea::file_error(in.path, "metadata " + key + " is \"" + text + "\"; wanted a number");
}
/// Heads, rows and width of [H, n, d] or [1, H, n, d].
inline void sizes(const input& in, const char* name, const fovea::array& a, isize& heads, isize& rows, isize& width) {
  if (!fovea::is_float(a.type()) || (a.rank() != 3 && a.rank() != 4) || (a.rank() == 4 && a.dim(0) != 1))
    throw fovea::file_error(in.path, std::string("tensor ") + name + " is " + a.describe() +
                                         "; wanted floats [heads, n, width] or [1, heads, n, width]");
  heads = a.dim(-3), rows = a.dim(-2), width = a.dim(-1);
  if (heads < 1 || rows < 1 || width < 1)
    throw fovea::file_error(in.path,
                            std::string("tensor ") + name + " is " + a.describe() + "; wanted at least one of each");
}
}  // namespace detail

/// At most the first `most` tokens (0: all).
inline input read_input(const std::string& path, isize most) {
  input in;
  in.path = path;
  in.file = std::filesystem::path(path).filename().string();
  const fovea::safetensors_file f = fovea::read_safetensors(path);
  for (const char* name : {"q", "k", "v"})
    if (!f.tensors.contains(name))
      throw fovea::file_error(path, std::string("has no tensor \"") + name + "\"; wanted q, k and v");
  const fovea::array &q = f.tensors.at("q"), &k = f.tensors.at("k"), &v = f.tensors.at("v");
  isize k_rows = 0, k_width = 0, v_heads = 0, v_rows = 0;
  detail::sizes(in, "q", q, in.H, in.n, in.d);
  detail::sizes(in, "k", k, in.G, k_rows, k_width);
  detail::sizes(in, "v", v, v_heads, v_rows, in.e);
  if (k_rows != in.n || v_rows != in.n || v_heads != in.G || k_width != in.d || in.H % in.G != 0)
    throw fovea::file_error(path,
                            "q, k, v are " + q.describe() + ", " + k.describe() + ", " + v.describe() +
                                "; wanted q [H, n, d], k [G, n, d], v [G, n, e] with one n and H a multiple of G");
  in.model = detail::text_of(f, "model"), in.text = detail::text_of(f, "text");
  if (const auto t = detail::text_of(f, "layer"); !t.empty())
    in.layer = static_cast<int>(detail::number_of(in, "layer", t));
  if (const auto t = detail::text_of(f, "causal"); !t.empty()) in.causal = t == "1" || t == "true";
  const auto t = detail::text_of(f, "scale");
  in.scale = t.empty() ? 1.0 / std::sqrt(static_cast<double>(in.d)) : detail::number_of(in, "scale", t);
  if (!(in.scale > 0)) throw fovea::file_error(path, "metadata scale is " + t + "; wanted a positive number");

  const isize rows = most > 0 && most < in.n ? most : in.n;
  const auto cut = [&](const fovea::array& a) {
    const std::vector<float> all = a.floats();
    const isize heads = a.dim(-3), full = a.dim(-2), width = a.dim(-1);
    std::vector<float> out(static_cast<std::size_t>(heads * rows * width));
    for (isize h = 0; h < heads; ++h)
      std::copy_n(all.data() + h * full * width, rows * width, out.data() + h * rows * width);
    for (const float x : out)
      if (!std::isfinite(x)) throw fovea::file_error(path, "holds NaN or infinity; attention over it has no meaning");
    return out;
  };
  in.q = cut(q), in.k = cut(k), in.v = cut(v);
  in.n = rows;
  return in;
}

}  // namespace compare
