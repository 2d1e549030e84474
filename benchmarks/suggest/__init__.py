"""SuggestBench: do the rates that ``suggest_rates`` finds train as well as the best pair of a full grid?"""
