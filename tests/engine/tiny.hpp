// SPDX-License-Identifier: MIT
#pragma once
/// @file  A small random Llama in a folder of its own, and its logits in plain double loops written from the definition.

#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <string>
#include <vector>

#include <fovea/interop/safetensors.hpp>

#include "engine/model.hpp"

namespace tiny {

using fovea::isize;

struct geometry {
  isize layers = 3, heads = 6, kv_heads = 2, head_dim = 16, width = 40, mlp_width = 72, vocabulary = 97, context = 64;
  bool tied = false;
  fovea::element type = fovea::element::f32;
  std::string more = "";  ///< further keys of config.json: ", \"key\": value"
};

/// The folder goes with the object.
class folder {
 public:
  explicit folder(const geometry& g, unsigned seed = 1) : g_(g), random_(seed) {
    path_ = std::filesystem::temp_directory_path() / ("fovea_tiny_" + std::to_string(std::random_device{}()));
    std::filesystem::create_directories(path_);
    write_config("llama");
    const isize q = g.heads * g.head_dim, kv = g.kv_heads * g.head_dim;
    add("model.embed_tokens.weight", {g.vocabulary, g.width}, 1);
    add("model.norm.weight", {g.width}, 0.3, 1);
    if (!g.tied) add("lm_head.weight", {g.vocabulary, g.width}, 0.5);
    for (isize l = 0; l < g.layers; ++l) {
      const std::string at = "model.layers." + std::to_string(l) + ".";
      add(at + "input_layernorm.weight", {g.width}, 0.3, 1),
          add(at + "post_attention_layernorm.weight", {g.width}, 0.3, 1);
      add(at + "self_attn.q_proj.weight", {q, g.width}, 0.3), add(at + "self_attn.k_proj.weight", {kv, g.width}, 0.3);
      add(at + "self_attn.v_proj.weight", {kv, g.width}, 0.3), add(at + "self_attn.o_proj.weight", {g.width, q}, 0.3);
      add(at + "mlp.gate_proj.weight", {g.mlp_width, g.width}, 0.3);
      add(at + "mlp.up_proj.weight", {g.mlp_width, g.width}, 0.3);
      add(at + "mlp.down_proj.weight", {g.width, g.mlp_width}, 0.3);
    }
    write();
  }
  ~folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  folder(const folder&) = delete;
  folder& operator=(const folder&) = delete;

  std::string path() const { return path_.string(); }
  std::string weights() const { return (path_ / "model.safetensors").string(); }
  std::string config() const { return (path_ / "config.json").string(); }
  void write() const { fovea::write_safetensors(weights(), tensors); }
  void write_config(const std::string& type) const {
    std::ofstream(path_ / "config.json")
        << "{\"model_type\": \"" << type << "\", \"num_hidden_layers\": " << g_.layers
        << ", \"num_attention_heads\": " << g_.heads << ", \"num_key_value_heads\": " << g_.kv_heads
        << ", \"head_dim\": " << g_.head_dim << ", \"hidden_size\": " << g_.width
        << ", \"intermediate_size\": " << g_.mlp_width << ", \"vocab_size\": " << g_.vocabulary
        << ", \"max_position_embeddings\": " << g_.context
        << ", \"rope_theta\": 500.0, \"rms_norm_eps\": 1e-5, \"hidden_act\": \"silu\", \"tie_word_embeddings\": "
        << (g_.tied ? "true" : "false") << g_.more << "}\n";
  }
  /// Logits [tokens][vocabulary] of causal attention; RoPE without scaling.
  std::vector<std::vector<double>> logits(const std::vector<std::uint32_t>& ids) const;

  fovea::arrays tensors;

 private:
  using row = std::vector<double>;
  void add(const std::string& name, std::vector<isize> dims, double scale, double shift = 0) {
    std::normal_distribution<float> normal(static_cast<float>(shift), static_cast<float>(scale));
    fovea::array a(g_.type, dims);
    for (isize i = 0; i < a.size(); ++i)
      fovea::store_from_double(g_.type == fovea::element::f16    ? fovea::dtype::f16
                               : g_.type == fovea::element::bf16 ? fovea::dtype::bf16
                                                                 : fovea::dtype::f32,
                               a.mutable_data(), i, static_cast<double>(normal(random_)));
    tensors.emplace(name, a);
  }
  row times(const std::string& name, const row& x) const {
    const fovea::array& w = tensors.at(name);
    row y(static_cast<std::size_t>(w.dim(0)), 0.0);
    for (std::size_t i = 0; i < y.size(); ++i)
      for (std::size_t c = 0; c < x.size(); ++c) y[i] += w.at(static_cast<isize>(i * x.size() + c)) * x[c];
    return y;
  }
  row normed(const std::string& name, const row& x) const {
    double sum = 0;
    for (const double a : x) sum += a * a;
    row y = x;
    for (std::size_t c = 0; c < x.size(); ++c)
      y[c] *= tensors.at(name).at(static_cast<isize>(c)) / std::sqrt(sum / static_cast<double>(x.size()) + 1e-5);
    return y;
  }
  void turn(row& x, std::size_t position) const {
    const auto d = static_cast<std::size_t>(g_.head_dim);
    for (std::size_t h = 0; h < x.size(); h += d)
      for (std::size_t i = 0; i < d / 2; ++i) {
        const double angle =
            static_cast<double>(position) * std::pow(500.0, -2.0 * static_cast<double>(i) / static_cast<double>(d));
        const double a = x[h + i], b = x[h + i + d / 2];
        x[h + i] = a * std::cos(angle) - b * std::sin(angle),
              x[h + i + d / 2] = b * std::cos(angle) + a * std::sin(angle);
      }
  }
  row attended(const std::vector<row>& q, const std::vector<row>& k, const std::vector<row>& v, std::size_t i) const {
    const auto d = static_cast<std::size_t>(g_.head_dim), heads = static_cast<std::size_t>(g_.heads);
    row out(heads * d, 0.0);
    for (std::size_t h = 0; h < heads; ++h) {
      const std::size_t at = h / static_cast<std::size_t>(g_.heads / g_.kv_heads) * d;
      double total = 0;
      for (std::size_t j = 0; j <= i; ++j) {
        double s = 0;
        for (std::size_t c = 0; c < d; ++c) s += q[i][h * d + c] * k[j][at + c];
        const double weight = std::exp(s / std::sqrt(static_cast<double>(d)));
        total += weight;
        for (std::size_t c = 0; c < d; ++c) out[h * d + c] += weight * v[j][at + c];
      }
      for (std::size_t c = 0; c < d; ++c) out[h * d + c] /= total;
    }
    return out;
  }

  geometry g_;
  std::filesystem::path path_;
  std::mt19937 random_;
};

inline std::vector<std::vector<double>> folder::logits(const std::vector<std::uint32_t>& ids) const {
  std::vector<row> hidden, q(ids.size()), k(ids.size()), v(ids.size()), out;
  for (const std::uint32_t t : ids) {
    row& x = hidden.emplace_back();
    for (isize c = 0; c < g_.width; ++c)
      x.push_back(tensors.at("model.embed_tokens.weight").at(static_cast<isize>(t) * g_.width + c));
  }
  const auto add = [](row& to, const row& x) {
    for (std::size_t c = 0; c < to.size(); ++c) to[c] += x[c];
  };
  for (isize l = 0; l < g_.layers; ++l) {
    const std::string at = "model.layers." + std::to_string(l) + ".";
    for (std::size_t i = 0; i < ids.size(); ++i) {
      const row x = normed(at + "input_layernorm.weight", hidden[i]);
      q[i] = times(at + "self_attn.q_proj.weight", x), k[i] = times(at + "self_attn.k_proj.weight", x);
      v[i] = times(at + "self_attn.v_proj.weight", x);
      turn(q[i], i), turn(k[i], i);
    }
    for (std::size_t i = 0; i < ids.size(); ++i) {
      add(hidden[i], times(at + "self_attn.o_proj.weight", attended(q, k, v, i)));
      const row x = normed(at + "post_attention_layernorm.weight", hidden[i]);
      row gate = times(at + "mlp.gate_proj.weight", x);
      const row up = times(at + "mlp.up_proj.weight", x);
      for (std::size_t c = 0; c < gate.size(); ++c) gate[c] *= up[c] / (1 + std::exp(-gate[c]));
      add(hidden[i], times(at + "mlp.down_proj.weight", gate));
    }
  }
  for (const row& x : hidden)
    out.push_back(times(g_.tied ? "model.embed_tokens.weight" : "lm_head.weight", normed("model.norm.weight", x)));
  return out;
}

}  // namespace tiny
