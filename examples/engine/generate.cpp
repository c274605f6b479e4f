// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdio>

#include "error.hpp"
#include "sampler.hpp"
#include "setup.hpp"
#include "text.hpp"

namespace engine {
namespace {

void print(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
}

}  // namespace

int generate(const generate_options& o) {
  sampler choose(o.temperature, o.top_p, o.seed);
  setup s(o);
  const tokenizer words = tokenizer_of(o.model);
  const std::vector<token> prompt = words.encode(o.prompt);
  if (prompt.empty()) refuse("the prompt is empty");
  session run(s.net, s.plan, s.threads, {.context = o.context, .cache = o.cache});
  sequence text = run.make_sequence();
  text_stream stream(words);
  const auto& ends = s.net.config().end_tokens;
  logits l = run.forward({{text, prompt}}, logits_of::last);
  print(o.prompt);
  for (isize i = 0; i < o.count; ++i) {
    const token next = choose.next(l.row(0));
    if (!o.past_end && std::find(ends.begin(), ends.end(), next) != ends.end()) break;
    print(stream.push(next));
    if (i + 1 == o.count || text.tokens() == run.options().context) break;
    l = run.forward({{text, {&next, 1}}}, logits_of::last);
  }
  print(stream.finish() + "\n");
  return 0;
}

int tokens(const tokens_options& o) {
  const std::vector<token> ids = read_tokens(o.text, o.model, true);
  fovea::write_whole(o.output, [&](std::ofstream& out) {
    out.write(reinterpret_cast<const char*>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof(token)));
  });
  std::printf("%zu tokens\n", ids.size());
  return 0;
}

}  // namespace engine
