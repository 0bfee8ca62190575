"""The training loop and what belongs to it: step, optimizer, evaluation, checkpoints and metrics. Floor 3.

loop                 step, log, evaluate, save
step_source          where the groups of a step come from
offline_source       from a plan over stored groups
prefetch             makes the micro-batches of the next step in a thread
step, gradients      the passes of one step; their gradients, summed over all processes
optim                the optimizer, and the learning rate
step_records         one record per step, from which everything that is written about it is made
ledger, margins      what a step was, to the last digit; the margins of its groups
metrics              sums and counts between two log lines
outputs, progress    records to files, trackers and the terminal; live bars and signals
validation           loss and metrics of the validation groups
row_losses           the loss of every row in every evaluation
evaluation_contract  what measures the policy between two steps
best_evaluation      the best evaluation so far; when to stop early
stalled_loss         warns if the loss has not moved
reference_logps      log-probs of the reference for all groups of a run
reference_cut        how the groups are cut into micro-batches for it
recipe, agreement    what a resume must not change; what must be the same in all processes
checkpoint           what a checkpoint holds
checkpoint_writer    writes one
checkpoint_saves     when one is written
snapshot             from a run in memory to a checkpoint, and back
train_state          the few numbers that a run carries from step to step
final_model          writes `final/`
ending               why a run ended, and whether its model got worse
environment          the software and hardware of a run
device_memory        memory of the devices of all processes
out_of_memory        tries again in smaller micro-batches
"""
