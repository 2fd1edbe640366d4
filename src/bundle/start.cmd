@echo off
rem Serves the models of this folder. Needs no network. Flags of `hearth serve` may follow.
setlocal
set "HF_HUB_OFFLINE=1"
"%~dp0@BINARY@" serve --config "%~dp0hearth.toml" %*
set "code=%errorlevel%"
rem A double click would close the window before the message can be read.
if not "%code%"=="0" pause
exit /b %code%
