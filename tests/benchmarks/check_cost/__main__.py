from tests.benchmarks.check_cost.run import main

main()
