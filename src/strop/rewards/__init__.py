"""How good a completion is: functions that are shipped and a user's own, each called in a process apart. Floor 2, no
torch.

shipped    functions by name
code_tests, code_tests_process  tests on code that a model wrote, in a process with limits
lookup     a name to a function
worker     the process that calls them
calls      one call with a time limit, from this side
"""
