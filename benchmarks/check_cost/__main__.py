from benchmarks.check_cost.run import main

main()
