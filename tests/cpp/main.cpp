#include <cstdio>
#include <cstring>

#include "test.h"

int main(int argc, char** argv) {
  int failures = 0;
  for (const auto& [name, test] : testing::tests()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], name) == 0;
    if (!wanted) continue;
    try {
      test();
      std::printf("ok %s\n", name);
    } catch (const std::exception& error) {
      ++failures;
      std::printf("FAILED %s: %s\n", name, error.what());
    }
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}
