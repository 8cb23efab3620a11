"""Several models, folds and seeds on one data set: trained under one recipe, tested in pairs, by patient.

    OUTPUT/split/           the folds and split.csv, of `timm-densese data split`
    OUTPUT/study.yaml       what was asked for, so that the same command goes on
    OUTPUT/runs/MODEL/FOLD/ model_best.pth.tar, predictions.csv, log.txt, and run.json, which is there when it is done
    OUTPUT/predictions.csv  every run's, so that any other score can be computed later
    OUTPUT/report.html, metrics.json, scores.csv, table.md
"""
from .study import study

__all__ = ['study']
