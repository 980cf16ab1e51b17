import { describe, expect, it } from "vitest";
import {
  agoText,
  bitsText,
  bytesText,
  countText,
  marginOf,
  parseBytes,
  parsePositive,
  percentText,
  signedText,
  significant,
  tickText,
  timeText,
} from "../src/figures/quantities";

describe("numbers as text", () => {
  it.each([
    [0, "0"],
    [0.21512, "0.215"],
    [0.000312, "0.000312"],
    [0.0000312, "3.12e−5"],
    [-12.34, "−12.3"],
    [123.4, "123"],
    [999.9, "1000"],
    [12_345_678, "1.23e7"],
    [Number.NaN, "–"],
  ])("%d in three significant digits", (value, text) => expect(significant(value)).toBe(text));

  it.each([
    [0, "0 B"],
    [1023, "1023 B"],
    [1024, "1.00 KiB"],
    [70 * 2 ** 20, "70.0 MiB"],
    [269_060_552, "256.6 MiB"],
    [3 * 2 ** 40, "3.00 TiB"],
  ])("%d bytes", (bytes, text) => expect(bytesText(bytes)).toBe(text));

  it("says shares, and never makes something of nothing or nothing of something", () => {
    expect([0, 0.0004, -0.0004, 0.0312, 0.51, -0.2].map(percentText)).toEqual([
      "0.0 %",
      "<0.1 %",
      "−<0.1 %",
      "3.1 %",
      "51 %",
      "−20 %",
    ]);
  });

  it("gives differences a sign", () => {
    expect([1.5, -1.5, 0].map((value) => signedText(value, String))).toEqual(["+1.5", "−1.5", "±0"]);
  });

  it("keeps ticks short", () => {
    expect([0.1, 0.001, 0.0001, 1.25, 0].map(tickText)).toEqual(["0.1", "0.001", "1e−4", "1.25", "0"]);
  });

  it("says counts, bits and times", () => {
    expect([null, 145, 12_345, 3_483_008, 134_515_008].map(countText)).toEqual([
      "–",
      "145",
      "12.3 k",
      "3.48 M",
      "134.5 M",
    ]);
    expect([null, 4.306].map(bitsText)).toEqual(["–", "4.31"]);
    expect([12.3, 1234, 2_500_000].map(timeText)).toEqual(["12.3 µs", "1.23 ms", "2.50 s"]);
  });

  it("says what a step is worth in steps that are small", () => {
    expect([2 ** 17, 2 ** 30].map((bytes) => marginOf(bytes).name)).toEqual(["KiB", "MiB"]);
  });

  it("says how long ago", () => {
    const now = Date.parse("2026-01-02T00:00:00Z");
    expect(agoText("2026-01-01T23:59:30Z", now)).toBe("just now");
    expect(agoText("2026-01-01T22:59:00Z", now)).toBe("1 h ago");
    expect(agoText("2025-12-01T00:00:00Z", now)).toBe("2025-12-01");
    expect(agoText("no date", now)).toBe("");
  });
});

describe("text as numbers", () => {
  it.each([
    ["70MiB", 70 * 2 ** 20],
    [" 1.5 GB ", 1.5e9],
    ["73400320", 73_400_320],
    ["1e3kb", 1e6],
    ["70 M", null],
    ["", null],
    ["-5MiB", null],
  ])("%j bytes", (text, bytes) => expect(parseBytes(text)).toBe(bytes));

  it("takes positive numbers alone", () => {
    expect(["4", "3,5", "0", "-1", "", "four", "1e999"].map(parsePositive)).toEqual([
      4,
      3.5,
      null,
      null,
      null,
      null,
      null,
    ]);
  });
});
