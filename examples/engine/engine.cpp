// SPDX-License-Identifier: MIT
/// @file  A small inference engine whose attention is fovea's: runs Llama-family models, any mechanism in any layer and head.
///
///   engine generate --model DIR --prompt "The capital of France is" --n 200 --temperature 0.8 --top-p 0.95 --seed 1
///   engine perplexity --model DIR --tokens FILE.bin --context 1024 --attention policy.json --json
///   engine capture FILE --model DIR --layers 0,14,29 --out qkv.safetensors
///
/// Errors   one line on stderr, exit code 2.

#include <CLI/CLI.hpp>

#include "commands.hpp"
#include "common/complain.hpp"

namespace {

void add_model(CLI::App* command, engine::model_options& o) {
  command->add_option("--model", o.model, "folder of config.json, model.safetensors and tokenizer.json")->required();
  command->add_option("--attention", o.attention, "policy file: a mechanism for each layer and head (default: exact)");
  command->add_option("--threads", o.threads, "threads; results do not depend on it")->capture_default_str();
  command->add_option("--cache", o.cache, "type of exact KV stores: f32, f16 or bf16 (default f16)")
      ->transform(CLI::CheckedTransformer(std::map<std::string, fovea::dtype>{
          {"f32", fovea::dtype::f32}, {"f16", fovea::dtype::f16}, {"bf16", fovea::dtype::bf16}}));
}

CLI::App* add_generate(CLI::App& app, engine::generate_options& o) {
  CLI::App* c = app.add_subcommand("generate", "continues a text");
  add_model(c, o);
  c->add_option("--prompt", o.prompt, "the text to continue")->required();
  c->add_option("--n", o.count, "most tokens to write")->capture_default_str()->check(CLI::NonNegativeNumber);
  c->add_option("--context", o.context, "most tokens of prompt and answer (default: the model's)");
  c->add_option("--temperature", o.temperature, "0: always the likeliest token")->capture_default_str();
  c->add_option("--top-p", o.top_p, "draw from the likeliest tokens that make up this share")->capture_default_str();
  c->add_option("--seed", o.seed, "the same seed gives the same text")->capture_default_str();
  c->add_flag("--past-end", o.past_end, "go on behind the model's end token");
  return c;
}

CLI::App* add_perplexity(CLI::App& app, engine::perplexity_options& o) {
  CLI::App* c = app.add_subcommand("perplexity", "how well the model predicts a text");
  add_model(c, o);
  auto* ids = c->add_option("--tokens", o.tokens, "token ids, raw little-endian u32");
  auto* text = c->add_option("--text", o.text, "UTF-8 text")->excludes(ids);
  ids->excludes(text);
  c->add_option("--offsets", o.offsets, "first tokens of the windows (default: one behind the other)")->delimiter(',');
  c->add_option("--context", o.context, "tokens of a window")->capture_default_str();
  c->add_option("--chunk", o.chunk, "tokens of one call")->capture_default_str();
  c->add_option("--batch", o.batch, "windows run together")->capture_default_str();
  c->add_flag("--json", o.json, "JSON to stdout: mean_nll, perplexity, nll_each, ...");
  c->callback([&o] {
    if (o.tokens.empty() && o.text.empty()) throw CLI::RequiredError("--tokens or --text");
  });
  return c;
}

CLI::App* add_capture(CLI::App& app, engine::capture_options& o) {
  CLI::App* c =
      app.add_subcommand("capture", "writes q, k, v of layers, turned by RoPE, as compare and calibrate read them");
  c->add_option("input", o.input, "token ids (FILE.bin, raw u32) or UTF-8 text")->required();
  add_model(c, o);
  c->add_option("--layers", o.layers, "layers, counted from 0")->delimiter(',')->capture_default_str();
  c->add_option("--out", o.output, "file; with several layers NAME.layerN.safetensors")->capture_default_str();
  c->add_option("--offset", o.offset, "first token")->capture_default_str();
  c->add_option("--count", o.count, "tokens")->capture_default_str();
  c->add_flag("--half", o.half, "store f16 (default f32)");
  return c;
}

CLI::App* add_tokens(CLI::App& app, engine::tokens_options& o) {
  CLI::App* c = app.add_subcommand("tokens", "text to token ids");
  c->add_option("--model", o.model, "folder of tokenizer.json")->required();
  c->add_option("--text", o.text, "UTF-8 text")->required();
  c->add_option("--out", o.output, "raw u32 ids")->required();
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs Llama-family models with fovea's attention: any mechanism in any layer and head.", "engine");
  app.require_subcommand(1);
  engine::generate_options generate;
  engine::perplexity_options perplexity;
  engine::capture_options capture;
  engine::tokens_options tokens;
  const CLI::App* const generates = add_generate(app, generate);
  const CLI::App* const predicts = add_perplexity(app, perplexity);
  const CLI::App* const captures = add_capture(app, capture);
  add_tokens(app, tokens);
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    return complain("engine", e.what());
  }
  try {
    if (*generates) return engine::generate(generate);
    if (*predicts) return engine::perplexity(perplexity);
    if (*captures) return engine::capture(capture);
    return engine::tokens(tokens);
  } catch (const std::bad_alloc&) {
    return complain("engine", "not enough memory");
  } catch (const std::exception& e) {
    return complain("engine", e.what());
  }
}
