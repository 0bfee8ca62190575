"""From a run folder to what is wrong with the run, and a page that shows it. Floor 2, no torch.

In: a run folder, or several, as training left them, whole or not. Out: findings (`findings.json`) and a page
(`report.html`), one file that opens anywhere.

json_lines  a log of JSON lines as columns of numbers, fast for a million lines
run_record  a run folder as a `RunRecord`: everything below takes its numbers from there
escaping   text that others wrote, made fit for a page
findings   what a finding is; the thresholds
facts      what checks and charts derive from a record
checks/    what is looked for, in most cases one function per finding
diagnose   all checks, in order; the verdict
charts     inline SVG
curves     which charts a page has
tables     the tables of a page
page       the page, from templates/
write      both files into the run folder
ledgers    ledger.jsonl, read
samples    samples.jsonl, read
pair_accuracy  how often the chosen side of a pair wins
watch      findings while a run goes on
serve      the page of a run that goes on, for a browser on this computer
compare    where two runs part, and what differs first
"""
