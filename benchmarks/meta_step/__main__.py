from benchmarks.meta_step.run import main

main()
