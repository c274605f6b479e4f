// SPDX-License-Identifier: MIT
#pragma once
/// @file  A Llama-family model: its configuration (config.json) and its weights (model.safetensors, Hugging Face's names), mapped.
///
///   h += o_proj(attention(rope(q), rope(k), v)) of rmsnorm(h);     h += down(silu(gate(x)) up(x)) of rmsnorm(h)
///   logits = rmsnorm(h) E^T, where E is the embedding (tied) or lm_head.weight
///
/// Contract   any head counts (query heads a multiple of KV heads), tied or untied embeddings, RoPE theta and the scalings linear,
///            dynamic, yarn, llama3, any RMSNorm epsilon. Refused by name: other architectures, biases, activations other than
///            silu, sliding windows, sharded files, truncated files, missing tensors.
/// Memory     matrices stay in the file's pages; the norms are copied.

#include <string>
#include <vector>

#include <fovea/position/rope_table.hpp>

#include "weights.hpp"

namespace engine {

struct model_config {
  isize layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
  isize width = 0, mlp_width = 0, vocabulary = 0;
  isize context = 0;  ///< max_position_embeddings
  double rope_theta = 10000, rms_eps = 1e-6;
  fovea::rope_scaling rope_scaling = {};
  bool tied = false;
  std::vector<std::uint32_t> end_tokens = {};  ///< eos_token_id: one or several

  isize group() const { return heads / kv_heads; }
};

/// DIR/config.json; `path` is named in errors.
model_config read_model_config(const std::string& path);

struct layer_weights {
  std::vector<float> attention_norm, mlp_norm;  ///< [width]
  matrix q, k, v;                               ///< [heads head_dim, width], [kv_heads head_dim, width]
  matrix o;                                     ///< [width, heads head_dim]
  matrix gate, up, down;                        ///< [mlp_width, width] twice, [width, mlp_width]
};

class model {
 public:
  /// DIR/config.json and DIR/model.safetensors.
  explicit model(const std::string& directory);

  const model_config& config() const { return config_; }
  const layer_weights& layer(isize l) const { return layers_[static_cast<std::size_t>(l)]; }
  const matrix& embedding() const { return embedding_; }  ///< [vocabulary, width]
  const matrix& output() const { return output_; }        ///< the same, or lm_head
  const std::vector<float>& final_norm() const { return final_norm_; }
  const std::string& directory() const { return directory_; }

  std::size_t decode_bytes()
      const;                  ///< bytes of weights that one decode step reads: all matrices, the output one included
  double dense_macs() const;  ///< multiply-adds of a token in the layers' matrices, the output one left out

 private:
  std::string directory_;
  model_config config_;
  weights file_;
  matrix embedding_, output_;
  std::vector<float> final_norm_;
  std::vector<layer_weights> layers_;
};

}  // namespace engine
