# SPDX-License-Identifier: Apache-2.0
"""The cheapest setting that keeps the accuracy: `vtoken tune`.

`units`     which questions are asked in which order, as parts of tasks that `vtoken.eval.running` can run
`asking`    asks them: cells of a results folder, resumed and locked like those of a sweep
`costs`     what every setting costs on this machine, by the code of `vtoken.profile`
`betting`   bounds on retained accuracy that hold at every moment of looking
`race`      who is asked on, who is out, who has won
`outcome`   the sentence, the table, the plot and the preset
"""
