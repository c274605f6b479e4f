// SPDX-License-Identifier: MIT
/// @file  A small inference engine whose attention is fovea's: runs Llama-family models, any mechanism in any layer and head.
///
///   engine generate --model DIR --prompt "The capital of France is" --n 200 --temperature 0.8 --top-p 0.95 --seed 1
///   engine perplexity --model DIR --tokens FILE.bin --context 1024 --attention policy.json --json
///   engine capture FILE --model DIR --layers 0,14,29 --out qkv.safetensors
///   engine evaluate --model DIR --texts a.txt b.txt --policies a.json b.json --report DIR
///   engine sensitivity --model DIR --texts a.txt --attention policy.json
///   engine policy --model DIR --texts a.txt --attention policy.json --keep-loss 0.5% --out chosen.json
///   engine bench --model DIR --contexts 512,4096
///
/// Errors   one line on stderr, exit code 2.

#include <CLI/CLI.hpp>

#include "commands.hpp"
#include "common/complain.hpp"
#include "judging.hpp"

namespace {

void add_engine(CLI::App* command, engine::model_options& o) {
  command->add_option("--model", o.model, "folder of config.json, model.safetensors and tokenizer.json")->required();
  command->add_option("--threads", o.threads, "threads; results do not depend on it")->capture_default_str();
  command->add_option("--cache", o.cache, "type of exact KV stores: f32, f16 or bf16 (default f16)")
      ->transform(CLI::CheckedTransformer(std::map<std::string, fovea::dtype>{
          {"f32", fovea::dtype::f32}, {"f16", fovea::dtype::f16}, {"bf16", fovea::dtype::bf16}}))
      ->option_text("TYPE");
}

void add_model(CLI::App* command, engine::model_options& o) {
  add_engine(command, o);
  command->add_option("--attention", o.attention, "policy file: a mechanism for each layer and head (default: exact)");
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

CLI::App* add_bench(CLI::App& app, engine::bench_options& o) {
  CLI::App* c = app.add_subcommand("bench", "speed of prefill and decoding, the share of attention, memory");
  add_model(c, o);
  c->add_option("--contexts", o.contexts, "tokens before the timed steps; may go beyond the model's context")
      ->delimiter(',')
      ->capture_default_str();
  c->add_option("--to", o.to, "policies of constant memory go on from the last context, doubling it, up to here")
      ->capture_default_str();
  c->add_option("--steps", o.steps, "decode steps")->capture_default_str()->check(CLI::PositiveNumber);
  c->add_option("--rows", o.rows, "tokens of one part of a prefill")->capture_default_str()->check(CLI::PositiveNumber);
  c->add_flag("--json", o.json, "JSON to stdout");
  return c;
}

CLI::App* add_tokens(CLI::App& app, engine::tokens_options& o) {
  CLI::App* c = app.add_subcommand("tokens", "text to token ids");
  c->add_option("--model", o.model, "folder of tokenizer.json")->required();
  c->add_option("--text", o.text, "UTF-8 text")->required();
  c->add_option("--out", o.output, "raw u32 ids")->required();
  return c;
}

/// What evaluate, sensitivity and policy share.
void add_judging(CLI::App* c, engine::judging_options& o) {
  add_engine(c, o);
  c->add_option("--texts", o.texts.files, "what is predicted: UTF-8 texts, or token ids where a name ends in .bin")
      ->required();
  c->add_option("--copy", o.texts.copy, "the retrieval text is made of this file (default: the first of --texts)");
  c->add_flag("--no-copy", o.texts.without_copy, "no retrieval text");
  c->add_option("--context", o.texts.context, "tokens of a window")->capture_default_str();
  c->add_option("--windows", o.texts.windows, "windows of each text")->capture_default_str();
  c->add_option("--block", o.block, "predictions that count as one for the interval")->capture_default_str();
  c->add_option("--chunk", o.chunk, "tokens of one call")->capture_default_str();
}

CLI::App* add_evaluate(CLI::App& app, engine::evaluate_options& o) {
  CLI::App* c =
      app.add_subcommand("evaluate", "what policies lose and save against exact attention, on the same tokens");
  add_judging(c, o);
  c->add_option("--policies", o.policies, "policy files")->required();
  c->add_option("--report", o.folder, "folder for evaluate.html and evaluate.json");
  c->add_option("--speed-context", o.speed_context, "tokens of the timed prefill (default: those of a window)");
  c->add_option("--steps", o.steps, "timed decode steps")->capture_default_str();
  c->add_option("--repeats", o.repeats, "timed runs of each policy, in turns")->capture_default_str();
  c->add_flag("--json", o.json, "JSON to stdout instead of the table");
  return c;
}

CLI::App* add_sensitivity(CLI::App& app, engine::sensitivity_options& o) {
  CLI::App* c = app.add_subcommand("sensitivity", "swaps a policy in one layer at a time and ranks the layers by KL");
  add_judging(c, o);
  c->add_option("--attention", o.attention, "the policy")->required();
  c->add_option("--out", o.output, "JSON file for `engine policy --ranking`");
  c->add_flag("!--no-triples", o.triples, "leave out groups of three layers");
  c->add_flag("--json", o.json, "JSON to stdout instead of the table");
  return c;
}

CLI::App* add_policy(CLI::App& app, engine::policy_options& o) {
  CLI::App* c = app.add_subcommand("policy", "the most layers that a policy may change within a measured loss");
  add_judging(c, o);
  c->add_option("--attention", o.attention, "the policy")->required();
  c->add_option("--keep-loss", o.keep_loss, "most loss of perplexity: 0.5% or 0.005")
      ->transform(CLI::Validator(
          [](std::string& text) {
            if (!text.ends_with('%')) return std::string();
            try {
              text = std::to_string(std::stod(text) / 100);
            } catch (const std::exception&) {
              return "wanted a share such as 0.5%, not " + text;
            }
            return std::string();
          },
          "SHARE"));
  c->add_option("--ranking", o.ranking, "what `engine sensitivity --out` wrote (default: measured first)");
  c->add_option("--out", o.output, "the policy file to write")->required();
  return c;
}

CLI::App* add_report(CLI::App& app, engine::report_options& o) {
  CLI::App* c = app.add_subcommand("report", "makes the page of an evaluate.json again");
  c->add_option("input", o.input, "evaluate.json")->required();
  c->add_option("--report", o.folder, "folder for evaluate.html and evaluate.json")->required();
  return c;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Runs Llama-family models with fovea's attention: any mechanism in any layer and head.", "engine");
  app.require_subcommand(1);
  engine::generate_options generate;
  engine::perplexity_options perplexity;
  engine::capture_options capture;
  engine::bench_options bench;
  engine::tokens_options tokens;
  const CLI::App* const generates = add_generate(app, generate);
  const CLI::App* const predicts = add_perplexity(app, perplexity);
  const CLI::App* const captures = add_capture(app, capture);
  const CLI::App* const measures = add_bench(app, bench);
  add_tokens(app, tokens);
  engine::evaluate_options evaluate;
  engine::sensitivity_options sensitivity;
  engine::policy_options policy;
  engine::report_options report;
  const CLI::App* const evaluates = add_evaluate(app, evaluate);
  const CLI::App* const ranks = add_sensitivity(app, sensitivity);
  const CLI::App* const chooses = add_policy(app, policy);
  const CLI::App* const reports = add_report(app, report);
  evaluate.command = "engine";
  for (int i = 1; i < argc; ++i) evaluate.command += std::string(" ") + argv[i];
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
    if (*evaluates) return engine::evaluate(evaluate);
    if (*ranks) return engine::sensitivity(sensitivity);
    if (*chooses) return engine::make_policy(policy);
    if (*reports) return engine::report(report);
    if (*measures) return engine::bench(bench);
    return engine::tokens(tokens);
  } catch (const std::bad_alloc&) {
    return complain("engine", "not enough memory");
  } catch (const std::exception& e) {
    return complain("engine", e.what());
  }
}
