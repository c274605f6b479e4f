// SPDX-License-Identifier: MIT
#include "model.hpp"

#include <filesystem>

#include <fovea/interop/json.hpp>

namespace engine {
namespace {

using nlohmann::json;

/// config.json with every error naming the file and the key.
class config_reader {
 public:
  config_reader(std::string path, const json& j) : path_(std::move(path)), json_(j) {
    if (!j.is_object()) stop("is not a JSON object");
  }
  [[noreturn]] void stop(const std::string& what) const { throw fovea::file_error(path_, what); }
  bool has(const char* key) const { return json_.contains(key) && !json_[key].is_null(); }
  const json& at(const char* key) const { return json_[key]; }

  isize count(const char* key) const {
    if (!has(key)) stop(std::string("key \"") + key + "\" is missing");
    return count(key, 0);
  }
  isize count(const char* key, isize fallback) const {
    if (!has(key)) return fallback;
    const json& x = json_[key];
    if (!x.is_number_integer() || x.get<std::int64_t>() < 1 || x.get<std::int64_t>() > 1 << 28)
      stop(std::string("key \"") + key + "\" is " + x.dump() + "; wanted a whole number from 1 up");
    return static_cast<isize>(x.get<std::int64_t>());
  }
  double number(const char* key, double fallback) const {
    if (!has(key)) return fallback;
    if (!json_[key].is_number() || !(json_[key].get<double>() > 0))
      stop(std::string("key \"") + key + "\" is " + json_[key].dump() + "; wanted a positive number");
    return json_[key].get<double>();
  }
  bool flag(const char* key, bool fallback) const {
    if (!has(key)) return fallback;
    if (!json_[key].is_boolean())
      stop(std::string("key \"") + key + "\" is " + json_[key].dump() + "; wanted true or false");
    return json_[key].get<bool>();
  }
  std::string text(const char* key, const std::string& fallback) const {
    if (!has(key)) return fallback;
    if (!json_[key].is_string()) stop(std::string("key \"") + key + "\" is " + json_[key].dump() + "; wanted a text");
    return json_[key].get<std::string>();
  }

 private:
  std::string path_;
  const json& json_;
};

fovea::rope_scaling read_scaling(const config_reader& r, const std::string& path, isize context) {
  const char* key = r.has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  if (!r.has(key)) return {};
  const config_reader s(path + ": " + key, r.at(key));
  const std::string type = s.text("rope_type", s.text("type", "default"));
  const isize original = s.count("original_max_position_embeddings", context);
  const double factor = s.number("factor", 1);
  if (type == "default") return {};
  if (type == "linear") return fovea::rope_linear{factor};
  if (type == "dynamic") return fovea::rope_ntk{factor, original, context};
  if (type == "yarn")
    return fovea::rope_yarn{.factor = factor,
                            .original = original,
                            .beta_fast = s.number("beta_fast", 32),
                            .beta_slow = s.number("beta_slow", 1),
                            .attention_factor = s.number("attention_factor", 0)};
  if (type == "llama3")
    return fovea::rope_llama3{factor, s.number("low_freq_factor", 1), s.number("high_freq_factor", 4), original};
  s.stop("type \"" + type + "\" is not supported; known: default, linear, dynamic, yarn, llama3");
}

void refuse_unsupported(const config_reader& r) {
  const std::string type = r.text("model_type", "(none)");
  if (type != "llama") r.stop("model_type is \"" + type + "\"; this engine runs the Llama family (\"llama\")");
  const std::string activation = r.text("hidden_act", "silu");
  if (activation != "silu") r.stop("hidden_act is \"" + activation + "\"; this engine has silu");
  for (const char* bias : {"attention_bias", "mlp_bias"})
    if (r.flag(bias, false)) r.stop(std::string(bias) + " is true; this engine has no biases");
  if (r.has("sliding_window")) r.stop("sliding_window is set; give it as an attention policy instead");
  if (r.number("partial_rotary_factor", 1) != 1) r.stop("partial_rotary_factor is not 1; whole heads are turned");
}

}  // namespace

model_config read_model_config(const std::string& path) {
  const json j = fovea::parse_json(fovea::read_text(path, 1'000'000), path);
  const config_reader r(path, j);
  refuse_unsupported(r);
  model_config c;
  c.layers = r.count("num_hidden_layers"), c.heads = r.count("num_attention_heads");
  c.kv_heads = r.count("num_key_value_heads", c.heads), c.width = r.count("hidden_size");
  c.head_dim = r.count("head_dim", c.width / c.heads), c.mlp_width = r.count("intermediate_size");
  c.vocabulary = r.count("vocab_size"), c.context = r.count("max_position_embeddings");
  c.rms_eps = r.number("rms_norm_eps", 1e-6), c.tied = r.flag("tie_word_embeddings", false);
  c.rope_theta = r.number("rope_theta", 10000);
  if (r.has("rope_parameters"))
    c.rope_theta = config_reader(path, r.at("rope_parameters")).number("rope_theta", c.rope_theta);
  c.rope_scaling = read_scaling(r, path, c.context);
  if (c.heads % c.kv_heads != 0)
    r.stop("has " + std::to_string(c.heads) + " query heads and " + std::to_string(c.kv_heads) +
           " KV heads; the first must be a multiple of the second");
  if (c.head_dim % 2 != 0) r.stop("head_dim is " + std::to_string(c.head_dim) + "; RoPE needs an even width");
  if (r.has("eos_token_id")) {
    const json& end = r.at("eos_token_id");
    for (const json& x : end.is_array() ? end : json::array({end})) {
      if (!x.is_number_unsigned()) r.stop("key \"eos_token_id\" is " + end.dump() + "; wanted token numbers");
      c.end_tokens.push_back(x.get<std::uint32_t>());
    }
  }
  return c;
}

namespace {
std::string weights_path(const std::string& directory) {
  namespace fs = std::filesystem;
  const fs::path one = fs::path(directory) / "model.safetensors", index = one.string() + ".index.json";
  if (!fs::exists(one) && fs::exists(index))
    throw fovea::file_error(index.string(), "the weights are in several files; join them into one model.safetensors");
  return one.string();
}
}  // namespace

model::model(const std::string& directory)
    : directory_(directory),
      config_(read_model_config((std::filesystem::path(directory) / "config.json").string())),
      file_(weights_path(directory)) {
  const model_config& c = config_;
  embedding_ = file_.matrix_of("model.embed_tokens.weight", c.vocabulary, c.width);
  output_ = c.tied ? embedding_ : file_.matrix_of("lm_head.weight", c.vocabulary, c.width);
  final_norm_ = file_.vector_of("model.norm.weight", c.width);
  for (isize l = 0; l < c.layers; ++l) {
    const std::string at = "model.layers." + std::to_string(l) + ".";
    const auto take = [&](const char* name, isize rows, isize columns) {
      return file_.matrix_of(at + name + ".weight", rows, columns);
    };
    const isize q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    layer_weights w;
    w.attention_norm = file_.vector_of(at + "input_layernorm.weight", c.width);
    w.mlp_norm = file_.vector_of(at + "post_attention_layernorm.weight", c.width);
    w.q = take("self_attn.q_proj", q, c.width), w.k = take("self_attn.k_proj", kv, c.width);
    w.v = take("self_attn.v_proj", kv, c.width), w.o = take("self_attn.o_proj", c.width, q);
    w.gate = take("mlp.gate_proj", c.mlp_width, c.width), w.up = take("mlp.up_proj", c.mlp_width, c.width);
    w.down = take("mlp.down_proj", c.width, c.mlp_width);
    layers_.push_back(std::move(w));
  }
}

std::size_t model::decode_bytes() const {
  std::size_t bytes = output_.bytes();
  for (const layer_weights& w : layers_)
    for (const matrix* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down}) bytes += m->bytes();
  return bytes;
}

double model::dense_macs() const {
  double macs = 0;
  for (const layer_weights& w : layers_)
    for (const matrix* m : {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down})
      macs += static_cast<double>(m->rows) * static_cast<double>(m->columns);
  return macs;
}

}  // namespace engine
