"""What a run would do, said before it trains. Which file answers which question:

dry_run        what will this config do: model, data, rates, memory, events (`cpt train --dry_run`)
compile_ahead  does a step fit on chips that are not here, and how fast can it be (`cpt compile`): one record
step_tables    that record as tables
step_report    what follows from a compiled step: verdict, FLOPs, transfers, speeds, advice
absent_chips   the step compiled for a topology by name, or the compiler's refusal
memory         the step compiled here: bytes of one device by what they are for
roofline       seconds of a step by resource, from the data sheets of devices.chips
collectives    what chips send each other in a step
program        how often each instruction runs, its FLOPs and bytes
buffers        what is alive when a program needs most memory
hlo            the text of a compiled program, read
"""
